"""What a converted model has to beat, and what it is without its fast weights.

naive_copy        the teacher's projections under the update rule, nothing solved or trained: beta = 1/2, half-life 38
sliding_window    the teacher itself, attending to the last 64 tokens and the first 4, in the layers that are converted
fast_weights_off  our own model without what its fast weights read: what its other layers, and windows, do alone
window_off        our own model without the windows beside its fast weights, where it has them (hf_fwp/window.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.hosts import converted_layers
from hf_fwp.layer import FastWeightLayer, layers_of

from .dropout import leaving_out
from .families import attention_modules, copy_teacher
from .scores import Forward, compare, forward_of, heldout_blocks

HALF_LIFE = 38.0  # tokens until a fast weight has faded to one half
WINDOW = 64
SINKS = 4


def baselines(
    teacher: PreTrainedModel,
    data: Any,
    *,
    student: PreTrainedModel | None = None,
    layers: Sequence[int] | None = None,
    rule: str = "gated_delta_net",
    tokenizer: Any = None,
    tokens: int = 4096,
    sequence_length: int = 512,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """The measurements of `evaluate` for each baseline, with the `layers` of the student (default: all) converted."""
    if student is not None:
        layers, rule = converted_layers(student.config), student.config.fwp["rule"]
    elif layers is None:
        layers = range(teacher.config.num_hidden_layers)
    ids_NT = heldout_blocks(data, tokenizer, tokens=tokens, sequence_length=sequence_length)
    models = {
        "naive_copy": forward_of(naive_copy(teacher, layers=layers, rule=rule)),
        "sliding_window": sliding_window(teacher, layers=layers),
    }
    if student is not None and layers:
        models |= parts_off(student)
    return compare(models, forward_of(teacher), ids_NT, progress=progress, description="baselines")


def naive_copy(
    teacher: PreTrainedModel, *, layers: Sequence[int], rule: str = "gated_delta_net", half_life: float = HALF_LIFE
) -> PreTrainedModel:
    """The student nobody worked on: copied projections, positions as they were, every rate the same.

    What is not converted stays in the teacher's memory.
    """
    student = copy_teacher(teacher, layers=layers, fwp={"rule": rule}, share=True)
    for mixer in layers_of(student).values():
        set_plain_rates(mixer, half_life=half_life)
    return student.eval()


@torch.no_grad()
def set_plain_rates(mixer: FastWeightLayer, *, half_life: float) -> None:
    """beta = 1/2 and a decay of one half in `half_life` tokens, whatever the input."""
    if hasattr(mixer, "b_proj"):
        for parameter in mixer.b_proj.parameters():
            parameter.zero_()
    if hasattr(mixer, "a_proj"):
        mixer.a_proj.weight.zero_()
        mixer.A_log.zero_()
        mixer.dt_bias.fill_(math.log(math.expm1(math.log(2) / half_life)))  # softplus(dt_bias) = ln 2 / half_life


def sliding_window(
    teacher: PreTrainedModel, *, layers: Sequence[int], window: int = WINDOW, sinks: int = SINKS
) -> Forward:
    """The teacher whose `layers` see only the last `window` tokens (the current one included) and the first `sinks`."""
    forward = forward_of(teacher)
    attentions = [attention_modules(teacher)[layer] for layer in layers]
    check_masks(teacher)

    def windowed(ids_BT: Tensor) -> Tensor:
        seen_TT = window_mask(ids_BT.shape[1], window=window, sinks=sinks)
        mask = torch.zeros(seen_TT.shape, dtype=teacher.dtype).masked_fill(~seen_TT, torch.finfo(teacher.dtype).min)
        mask = mask[None, None].to(teacher.device)

        def restrict(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**inputs, "attention_mask": _both(mask, inputs.get("attention_mask"))}

        with hooked(attentions, lambda module: module.register_forward_pre_hook(restrict, with_kwargs=True)):
            return forward(ids_BT)

    return windowed


def check_masks(teacher: PreTrainedModel) -> None:
    """Refuse a teacher whose attention cannot be told what to look at."""
    if teacher.config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"the teacher's attention is {teacher.config._attn_implementation!r}, which takes no mask of its own; "
            "load it with attn_implementation='sdpa'"
        )


def window_mask(length: int, *, window: int = WINDOW, sinks: int = SINKS) -> Tensor:
    """[T, T], True where a token (row) may look: itself and the `window` - 1 before it, and the first `sinks`."""
    row, column = torch.arange(length)[:, None], torch.arange(length)
    return (column <= row) & ((column > row - window) | (column < sinks))


def _both(mask: Tensor, own: Tensor | None) -> Tensor:
    """What the teacher's own mask hides (a sliding window of its family) stays hidden."""
    if own is None:
        return mask
    if own.dtype == torch.bool:
        return mask.masked_fill(~own, torch.finfo(mask.dtype).min)
    return torch.where(mask < 0, mask, own)  # not the minimum: what is seen may have a linear bias in it


def parts_off(student: PreTrainedModel) -> dict[str, Forward]:
    """The student without its fast weights and, if it has any, without its windows."""
    mixers = layers_of(student).values()
    if not mixers:
        raise ValueError("the model has no fast weights, so no parts to measure it without; leave parts out")
    found = {"fast_weights_off": fast_weights_off(student)}
    if any(mixer.window is not None for mixer in mixers):
        found["window_off"] = window_off(student)
    return found


def fast_weights_off(student: PreTrainedModel) -> Forward:
    """The student with nothing coming out of its mixers, or, of those with a window, with that alone."""
    forward, mixers = forward_of(student), list(layers_of(student).values())

    def silence(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, None]) -> tuple[Tensor, None]:
        zeros = torch.zeros_like(output[0])
        return (args[1] + zeros if len(args) > 1 else zeros), None  # the stream, where the attention adds it itself

    def unread(mixer: FastWeightLayer) -> Any:
        reads = mixer.options.num_reads * mixer.options.value_head_dim
        return mixer.o_proj.register_forward_pre_hook(
            lambda _, args: torch.cat([torch.zeros_like(args[0][..., :reads]), args[0][..., reads:]], dim=-1)
        )

    def hook(mixer: Any) -> Any:
        return mixer.register_forward_hook(silence) if mixer.window is None else unread(mixer)

    def silent(ids_BT: Tensor) -> Tensor:
        with hooked(mixers, hook):
            return forward(ids_BT)

    return silent


def window_off(student: PreTrainedModel) -> Forward:
    """The student whose mixers see nothing of their windows, so that all lies outside."""
    forward, mixers = forward_of(student), list(layers_of(student).values())

    def blind(ids_BT: Tensor) -> Tensor:
        with leaving_out(mixers, torch.ones(len(mixers), 1, dtype=torch.bool)):
            return forward(ids_BT)

    return blind


@contextmanager
def hooked(modules: Sequence[nn.Module], register: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Hooks on `modules` for as long as this lasts."""
    hooks = [register(module) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
