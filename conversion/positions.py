"""How many positions a model has: without limit where they are rotary or ALiBi, or there are none."""

from __future__ import annotations

from itertools import chain
from typing import Any

from transformers import PreTrainedModel

TABLES = ("wpe", "embed_positions", "positions_embed")  # what families call a table of positions, learned or fixed


def positions_said(model: PreTrainedModel) -> int | None:
    """How many its config says, for rotary positions those that it has learned with; None where it says nothing."""
    return getattr(model.config, "max_position_embeddings", None) or None


def positions_of(model: PreTrainedModel) -> int | None:
    """How many it can read, because each has an entry in a table; None where there is no limit."""
    parts = chain(model.named_modules(), model.named_buffers())
    has_table = any(name.rpartition(".")[2] in TABLES for name, _ in parts)
    return positions_said(model) if has_table else None


def check_positions(model: PreTrainedModel, length: int, *, what: str = "sequence_length") -> None:
    """Refuse texts with more tokens than the model has positions."""
    positions = positions_of(model)
    if positions is not None and length > positions:
        name = model.name_or_path or type(model).__name__
        raise ValueError(f"{what} is {length}, but {name} has {positions} positions; give at most {positions}")


def check_recipe(model: PreTrainedModel, recipe: Any) -> None:
    """Refuse a recipe with longer sequences than the model has positions for."""
    check_positions(model, recipe.sequence_length)
    if recipe.extend_tokens:
        check_positions(model, recipe.extend_length, what="extend_length")
