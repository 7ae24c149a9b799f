"""Every kind of model: own ones of every rule, hybrids, converted ones. A new rule is tested with nothing added."""

import torch
from teachers import tiny_teacher
from tiny_fwp import KINDS, tiny_model

from hf_fwp.conversion.families import copy_teacher

# name: (family, converted layers, mixer options); the families' own attention stays in the other layers
CONVERTED = {
    "llama converted": ("llama", [0, 1], {}),
    "qwen3 half converted": ("qwen3", [0], {}),
    "mistral half converted": ("mistral", [1], {}),
}
WINDOWED = {
    "llama with a window": ("llama", [0, 1], {"window": 4, "sinks": 2}),
    "qwen3 half with a window": ("qwen3", [0], {"rule": "delta_net", "window": 3, "sinks": 0, "time_scales": 2}),
}
HOSTED = {**CONVERTED, **WINDOWED}
MODELS = [*KINDS, *HOSTED]
# A window counts positions, padded ones too (transformers' masks do): wide, where padding must change nothing.
WIDE = 64


def every_model(name: str, *, dtype=torch.float64, wide=False, **changes):
    """A tiny model in evaluation mode; `wide` makes sliding windows longer than the test's sequences."""
    if name not in HOSTED:
        window = {"sliding_window": WIDE} if wide and name == "hybrid" else {}
        return tiny_model(name, dtype=dtype, **{**window, **changes})
    family, layers, fwp = HOSTED[name]
    window = {"sliding_window": WIDE} if wide and family == "mistral" else {}
    changes = {"num_hidden_layers": 2, **window, **changes}
    return copy_teacher(tiny_teacher(family, **changes), layers=layers, fwp=fwp).to(dtype).eval()


def converted_layers_of(model) -> list[int]:
    """Indices of the layers with fast weights."""
    return list(model.hf_fwp_layers)
