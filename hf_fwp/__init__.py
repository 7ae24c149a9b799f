"""Fast weight programmers for Hugging Face Transformers. `import hf_fwp` makes the Auto classes know them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .configuration import FwpConfig
from .hosts import register_hosts
from .interop.fla import register_checkpoints
from .layer import FastWeightLayer, backends_of, layers_of
from .ops import delta_product, delta_rule, gated_delta_rule, linear_attention
from .options import MixerOptions
from .rules import RULES, Rule

__version__ = "0.1.0"

# In a checkout `conversion/` stands beside this folder; an installed package has it inside.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.cfg").is_file() and (_checkout / "conversion").is_dir():
    __path__.append(str(_checkout))

AutoConfig.register(FwpConfig.model_type, FwpConfig, exist_ok=True)
register_hosts()
register_checkpoints()

# Names whose modules are loaded when first used: name -> (module, attribute).
_LAZY = {
    "convert": ("hf_fwp.conversion", "convert"),
    "export": ("hf_fwp.exporting", "export"),
    "push": ("hf_fwp.hub", "push"),
    "serve": ("hf_fwp.serving", "serve"),
    "export_code": ("hf_fwp.bundle", "export_code"),
    "inspect": ("hf_fwp.inspection", "inspect"),
    "OnnxDecoder": ("hf_fwp.interop.onnx", "OnnxDecoder"),
    "patch_hybrids": ("hf_fwp.interop.hybrids", "patch_hybrids"),
    "HOSTS": ("hf_fwp.hosts", "HOSTS"),
    "FwpModel": ("hf_fwp.modeling", "FwpModel"),
    "FwpPreTrainedModel": ("hf_fwp.modeling", "FwpPreTrainedModel"),
    "FwpForCausalLM": ("hf_fwp.modeling", "FwpForCausalLM"),
    "FwpForSequenceClassification": ("hf_fwp.modeling", "FwpForSequenceClassification"),
    "FwpForTokenClassification": ("hf_fwp.modeling", "FwpForTokenClassification"),
    "FwpForQuestionAnswering": ("hf_fwp.modeling", "FwpForQuestionAnswering"),
    "pad_series": ("hf_fwp.series", "pad_series"),
    "FastWeightPainter": ("hf_fwp.painter", "FastWeightPainter"),
    "LEARNING_RULES": ("hf_fwp.learning_rules", "LEARNING_RULES"),
    "dual_form": ("hf_fwp.duality", "dual_form"),
}

__all__ = [
    "RULES",
    "FastWeightLayer",
    "FwpConfig",
    "MixerOptions",
    "Rule",
    "backends_of",
    "delta_product",
    "delta_rule",
    "gated_delta_rule",
    "layers_of",
    "linear_attention",
    *_LAZY,  # pyright: ignore[reportUnsupportedDunderAll]  it follows no names but literal ones
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    return getattr(importlib.import_module(module_name), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
