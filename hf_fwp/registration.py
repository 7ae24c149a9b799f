"""Who must be told of a kind of model: transformers' Auto classes, its Trainer, its server, and peft."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL = "AutoModelForCausalLM"
SERVER = "transformers.cli.serving.model_manager"


def register_models_of(config_class: Any, models: Mapping[Any, type], lora_targets: Iterable[str]) -> None:
    """Make the Auto classes, the keys of `models`, and peft know the model classes of a config class."""
    for auto_class, model_class in models.items():
        auto_class.register(config_class, model_class, exist_ok=True)
        if auto_class.__name__ == CAUSAL:
            # Trainer shifts a smoothed loss's labels for classes named here (huggingface/transformers#17960, #27161)
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__
            name_for_server(model_class.__name__, model_class)
    try:
        from peft.utils import constants  # 0.2 s: only once a model is really used
    except ImportError:  # a dependency of the package, which exported code does without
        return
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[config_class.model_type] = list(lora_targets)


def name_for_server(name: str, model_class: type) -> None:
    """Let `transformers serve`, in the process that runs it, find the class that a config.json names.

    It looks among the names of the `transformers` that it imported, which may be another one than here: transformers'
    processing_utils imports the package a second time (no public issue found).
    """
    server = sys.modules.get(SERVER)
    if server is not None:
        setattr(server.transformers, name, model_class)
