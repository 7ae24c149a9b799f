"""One token of a mixer in one launch (kernels/mixer_step.py): which mixers and calls it serves, and the call itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cache import MixerInputs
from .companions import ShortConvolution
from .options import MixerOptions
from .rules import linear_class

if TYPE_CHECKING:
    from .layer import FastWeightLayer

# The rules of the linear class with one rate per state, and whether they take away what the key retrieves.
ERASES = {"linear_attention": False, "delta_net": True, "gated_delta_net": True}

# What the kernel can do, option by option; everything that is not named here it can do in any form.
KNOWN: dict[str, tuple[Any, ...]] = {
    "rule": tuple(ERASES),
    "feature_map": ("identity", "silu", "relu", "elu1"),
    "qk_norm": ("none", "l2", "sum"),
    "head_norm": (False, True),
    "value_skip": (0, 1),
    "window": (0,),
    "backend": (None, "step"),
}
# the same function of another projection
GATES = {"low_rank_sigmoid": "sigmoid", "low_rank_sigmoid_bias": "sigmoid"}
# Modules whose weights the kernel reads itself, and the types it knows: an adapter around one would be passed over.
READ = ("q_conv1d", "k_conv1d", "v_conv1d", "q_norm", "k_norm", "o_norm")
READABLE = {ShortConvolution, nn.RMSNorm, type(None)}
LARGEST = 1 << 15  # numbers of a state that fit the registers of one program
MOST_STATES = 124  # whose rotation two integers tell


def serves(options: MixerOptions) -> bool:
    """Whether the kernel computes what a mixer with these options does."""
    padded = 1
    for size in (options.head_dim, options.value_head_dim):
        padded *= 1 << (size - 1).bit_length()
    return (
        all(getattr(options, name) in known for name, known in KNOWN.items())
        and not options.rule_options.get("normalize")
        and options.rule_options.get("slow_net", "linear") == "linear"
        and options.rule_options.get("use_beta", True)
        and padded <= LARGEST
        and options.num_states <= MOST_STATES
    )


def can_decode(layer: FastWeightLayer, inputs: MixerInputs, states: Mapping[str, Tensor]) -> bool:
    """Whether this call can be one launch. It overwrites the states, which the caller must have allowed."""
    x_BTD, state = inputs.hidden_BTD, states.get("state")
    return (
        layer.fused
        and state is not None
        and state.is_contiguous()
        and linear_class.has_decode_kernel(x_BTD.device.type)
        and linear_class.computing_dtype(x_BTD, state) == torch.float32
        and all(type(layer._modules.get(name)) in READABLE for name in READ)
        and all(x.stride()[1:] == (x.shape[2], 1) for name, x in states.items() if name != "state" and x.shape[1])
    )


def decode(layer: FastWeightLayer, inputs: MixerInputs, states: Mapping[str, Tensor]) -> Tensor:
    """The reads of one token per row, [B, 1, reads * V], then the values with `value_skip`; states are overwritten."""
    from .kernels.mixer_step import Factors, Sizes, flags, mixer_step

    o = layer.options
    sizes = Sizes(*layer.heads, o.heads_of_states, o.time_scales, o.head_dim, o.value_head_dim)
    return mixer_step(
        states["state"],
        [states[f"{name}_conv"] for name in "qkv"] if o.conv_size else [],
        _inputs(layer, inputs),
        _weights(layer),
        sizes,
        Factors(o.head_dim**-0.5 if o.scale is None else o.scale, o.norm_eps, 1.0 + o.allow_neg_eigval, o.output_scale),
        flags(o.rotates) if len(set(o.rotates)) > 1 else [],
        o.feature_map,
        o.qk_norm,
        GATES.get(o.output_gate, o.output_gate),
        ERASES[o.rule],
        bool(o.value_skip),
    )


def _inputs(layer: FastWeightLayer, inputs: MixerInputs) -> Any:
    from .kernels.mixer_step import Inputs

    x_BTD = inputs.hidden_BTD
    cos, sin = (None, None) if inputs.rotary is None else inputs.rotary
    return Inputs(
        *(project(x_BTD) for project in (layer.q_proj, layer.k_proj, layer.v_proj)),
        b=layer.b_proj(x_BTD) if layer.projects("beta") else None,
        a=layer.a_proj(x_BTD) if layer.projects("g") else None,
        gate=None if layer.options.output_gate == "none" else layer.g_proj(x_BTD),
        cos=cos,
        sin=sin,
        mask=inputs.mask_BT,
    )


def _weights(layer: FastWeightLayer) -> Any:
    from .kernels.mixer_step import Weights

    o, found = layer.options, {}
    if o.conv_size:
        found |= {f"filter_{name}": getattr(layer, f"{name}_conv1d").weight for name in "qkv"}
    if layer.projects("g"):
        found |= {"rate": layer.A_log, "step": layer.dt_bias}
    if o.head_norm:
        found |= {"norm_q": layer.q_norm.weight, "norm_k": layer.k_norm.weight}
    if o.state_bias:
        found |= {"bias_q": layer.q_bias, "bias_k": layer.k_bias}
    if o.output_norm:
        found["norm_o"] = layer.o_norm.weight
    return Weights(**found)
