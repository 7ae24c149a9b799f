"""What a model is given: checked, and said in words when it cannot be read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_ids(input_ids: Tensor) -> None:
    """Raise ValueError unless these are token ids [B, T]."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it must be [B, T]: add the batch with [None]")
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; give token ids (torch.long), or inputs_embeds")


def check_values(inputs_embeds: Tensor, width: int, *, called: str) -> None:
    """Raise ValueError unless these are values [B, T, width]; `called` is the field that says the width."""
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width:
        raise ValueError(
            f"inputs_embeds has shape {list(inputs_embeds.shape)}; it must be [B, T, {called}] with {called} {width}"
        )


def check_times(times: Tensor, *, batch: int, length: int, asked: bool) -> None:
    """Raise ValueError unless these are times [B, T] and a layer asked for them."""
    if not asked:
        raise ValueError("times were given, but no layer asks for them; those of rule='continuous_fwp' do")
    if tuple(times.shape) != (batch, length) or not times.is_floating_point():
        raise ValueError(
            f"times has shape {list(times.shape)} and dtype {times.dtype}; it must be [B, T] = {[batch, length]} in "
            "floating point: when each observation was made"
        )


def look_up(table: nn.Module, index: Tensor, *, of: str, limit: str, count: int) -> Tensor:
    """table(index); on a CPU an index outside of it is named (an accelerator would have to be waited for)."""
    if torch.compiler.is_compiling():
        return table(index)
    try:
        return table(index)
    except IndexError as fault:
        low, high = int(index.min()), int(index.max())
        raise ValueError(
            f"{of} holds {low if low < 0 else high}, but {limit} is {count}; allowed are 0 to {count - 1}: check that "
            "tokenizer and model belong together, or make the model larger"
        ) from fault


def last_real(attention_mask: Tensor | None, hidden_BTD: Tensor) -> Tensor | int:
    """Where the last real token of each row stands."""
    if attention_mask is None:
        return -1
    length = hidden_BTD.shape[1]
    return (attention_mask[:, -length:].bool() * torch.arange(length, device=hidden_BTD.device)).argmax(-1)
