"""What a saved model is: known from its config, before its weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.utils.peft_utils import find_adapter_config_file

from .hosts.table import HEADS
from .registration import CAUSAL


def config_of(source: str | os.PathLike[str]) -> Any:
    """The config of a folder or a Hub id; of an adapter it is that of the base model."""
    adapter = find_adapter_config_file(str(source))
    if adapter is not None:
        source = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return AutoConfig.from_pretrained(str(source))


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a folder or Hub id holds an adapter of peft."""
    return find_adapter_config_file(str(source)) is not None


def head_of(config: Any, names: Iterable[str]) -> str | None:
    """The Auto class whose model for this config is called by one of the names; None where there is none."""
    names = set(names)
    for auto in HEADS.values():
        model_class = model_class_of(auto, config)
        if model_class is not None and model_class.__name__ in names:
            return auto
    return None


def model_class_of(auto: str, config: Any) -> Any:
    """The class that an Auto class has for a config; None where it has none."""
    return getattr(transformers, auto)._model_mapping.get(type(config), None)


def refuse_other_heads(config: Any, names: Iterable[str], *, told: str) -> None:
    """Raise ValueError unless one of the names is that of the config's causal language model; `told` is what is held.

    Loaded as one, any other model would be given an output head of random weights.
    """
    if head_of(config, names) != CAUSAL:
        raise ValueError(
            f"{told} ({config.model_type}); give a causal language model, or the folder in which save_pretrained wrote "
            "one"
        )


def refuse_named_heads(config: Any, source: str | os.PathLike[str]) -> None:
    """The same for a folder or Hub id whose config names a model with another head; one that names none is let pass."""
    names = config.architectures or []
    if head_of(config, names) not in (None, CAUSAL):
        refuse_other_heads(config, names, told=f"{os.fspath(source)} holds {names}")
