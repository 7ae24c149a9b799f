"""Faster functions for the hybrids of transformers: Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear and their relatives.

Their layers look up the gated delta rule and the short convolution in the globals of their modeling file. Without
other packages these are fallbacks in plain PyTorch; with flash-linear-attention installed they are its kernels, on a
processor too, where those fail (no public issue found). `patch_hybrids` puts the operators of this package in their
place, and takes the start of every packed sequence from `position_ids`, from which the stock layers do not
(huggingface/transformers#44717, #46093, #46851):

    out, state = gated_delta_rule(q, k, v, g, beta)        y_t = act(Σ_j w_j x_{t-j} + b),  j < size
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..ops import gated_delta_rule
from ..packing import Window, packed_segments


def chunk_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **signals: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule under the stock names; q, k [B,T,H,K], v [B,T,HV,V], beta [B,T,HV], g the same or, with a
    decay for every channel, [B,T,HV,K]."""
    tensors = (query, key, value, g, beta)
    batch, length = value.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = packed_segments(batch=batch, length=length, **_packing(signals))
    if cu_seqlens is not None and batch > 1:
        tensors = tuple(x.reshape(1, -1, *x.shape[2:]) for x in tensors)
    out, state = gated_delta_rule(
        *tensors,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )
    return out.reshape(batch, length, *out.shape[2:]), state


def recurrent_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **signals: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same for the single token of a decode step."""
    return chunk_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        **signals,
    )


def convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **signals: Any,
) -> Tensor:
    """Causal depthwise convolution of [B, C, T] with weight [C, size]; it does not look across packed sequences."""
    x_BTC = hidden_states.transpose(1, 2)
    batch, length, channels = x_BTC.shape
    cu_seqlens = packed_segments(batch=batch, length=length, **_packing(signals))
    if cu_seqlens is not None:
        x_BTC = x_BTC.reshape(1, batch * length, channels)
    taps, _ = Window.of(None, cu_seqlens, total=x_BTC.shape[1]).taps(x_BTC, weight.shape[-1], None)
    out_BTC = _convolved(taps, weight, bias, activation).to(hidden_states.dtype)
    return out_BTC.reshape(batch, length, channels).transpose(1, 2)


def convolution_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The same for the next tokens [B, C, T] after the last inputs conv_state [B, C, size], which moves on in place."""
    longer_BCT = torch.cat([conv_state, hidden_states], dim=-1)
    conv_state.copy_(longer_BCT[..., -conv_state.shape[-1] :])
    longer, length, end = longer_BCT.transpose(1, 2), hidden_states.shape[-1], longer_BCT.shape[-1]
    taps = [longer[:, end - length - j : end - j] for j in range(weight.shape[-1])]
    return _convolved(taps, weight, bias, activation).to(hidden_states.dtype).transpose(1, 2)


def _convolved(taps: list[Tensor], weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)  # in bf16 every addition would round
    weight = weight.to(wide)
    out_BTC = taps[0].to(weight.dtype) * weight[:, -1]
    for j, tap_BTC in enumerate(taps[1:], start=1):
        out_BTC = torch.addcmul(out_BTC, tap_BTC.to(weight.dtype), weight[:, -1 - j])
    if bias is not None:
        out_BTC = out_BTC + bias.to(wide)
    return out_BTC if activation is None else ACT2FN[activation](out_BTC)


def _packing(signals: Mapping[str, Any]) -> dict[str, Any]:
    return {name: signals.get(name) for name in ("cu_seq_lens_q", "seq_idx")}


# Name in the modeling file -> (ours, the arguments that the file passes by position).
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "torch_chunk_gated_delta_rule": (chunk_rule, ("query", "key", "value", "g", "beta")),
    "torch_recurrent_gated_delta_rule": (recurrent_rule, ("query", "key", "value", "g", "beta")),
    "chunk_kimi_delta_attention": (chunk_rule, ("query", "key", "value", "g", "beta")),
    "recurrent_kimi_delta_attention": (recurrent_rule, ("query", "key", "value", "g", "beta")),
    "causal_conv1d_fn": (convolution, ("hidden_states", "weight", "bias", "activation")),
    "causal_conv1d_update": (convolution_update, ("hidden_states", "conv_state", "weight", "bias", "activation")),
}
HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear")


def patch_hybrids(model: nn.Module | None = None) -> ExitStack:
    """Let transformers' hybrids compute with the operators of this package, until the result is closed.

        with hf_fwp.patch_hybrids(model):      # inside only
            model(input_ids)
        patch = hf_fwp.patch_hybrids()         # from here on, in every family of HYBRIDS
        patch.close()                          # as it was

    The functions belong to a family's modeling file: every model of that family changes with the one that is given.
    A given `model` also sees that a batch is packed when only its `position_ids` start again.

    Raises:
        ValueError: the model has no layer of these families, or the installed transformers defines the functions
            with other arguments than those known here.
    """
    modules = _modeling_files(model)
    found = [(module, name) for module in modules for name in FUNCTIONS if hasattr(module, name)]
    for module, name in found:
        _check_arguments(module, name)
    patch = ExitStack()
    for module, name in found:
        patch.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, FUNCTIONS[name][0])
    if model is not None:
        patch.callback(model.register_forward_pre_hook(_mark_sequences, with_kwargs=True).remove)
    return patch


def _modeling_files(model: nn.Module | None) -> list[ModuleType]:
    names = [f"transformers.models.{family}.modeling_{family}" for family in HYBRIDS]
    if model is None:
        return [importlib.import_module(name) for name in names]
    used = {type(module).__module__ for module in model.modules()}
    if not used.intersection(names):
        raise ValueError(
            f"{type(model).__name__} is none of the hybrids whose functions can be replaced ({', '.join(HYBRIDS)}); "
            "models of this package need no patch"
        )
    return [sys.modules[name] for name in names if name in used]


def _check_arguments(module: ModuleType, name: str) -> None:
    expected = FUNCTIONS[name][1]
    given = tuple(inspect.signature(getattr(module, name)).parameters)[: len(expected)]
    if given != expected and FUNCTIONS[name][0] is not getattr(module, name):
        raise ValueError(
            f"{module.__name__}.{name} of transformers {transformers.__version__} takes ({', '.join(given)}, ...) and "
            f"not ({', '.join(expected)}, ...): this version cannot be patched; use transformers 5.17 to 5.23"
        )


def _mark_sequences(model: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Name the sequences of a packed batch to every layer, and give it no cache: that has one state for each row."""
    if given.get("past_key_values") is not None or given.get("attention_mask") is not None:
        return arguments, given
    signals, positions = _packing(given), given.get("position_ids")
    tokens = next((x for x in (given.get("input_ids"), given.get("inputs_embeds"), *arguments) if x is not None), None)
    if tokens is None:
        return arguments, given
    bounds = packed_segments(batch=tokens.shape[0], length=tokens.shape[1], position_ids=positions, **signals)
    if bounds is None:
        return arguments, given
    longest = int((bounds[1:] - bounds[:-1]).max())
    marks = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return arguments, given | marks | {"use_cache": False}
