"""The rules that have inputs, weights or states of their own: their arguments checked, a backend chosen and run.

    reference   the recurrence over the rule's own step
    torch       the rule's fast form: the parts linear in their state chunked, the rest walked through with a backward
                that keeps few states (walk.py)
    triton      the same on a GPU: the parts linear in their state by the kernels of the linear class where these take
                their sizes, the rest by the rule's own kernel, which holds the state on the chip (kernels/walk.py)
    step        one token, as generate() needs it, optionally updating the given states in place

Packed sequences become rows of a padded batch, so that they run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import delta_net, linear_attention
from .base import Own, Rule, States, keep_valid, recurrence
from .checks import check_arguments, check_own_arguments, sequence_bounds
from .linear_class import LinearClassCall, apply_linear_class, choose_backend, computing_dtype, l2_normalize
from .triton_fit import why_no_kernel, why_not_triton
from .walk import walk

Inputs = dict[str, Tensor]
LARGEST = 128  # size of a head, or columns of values, that a kernel keeps on the chip


@dataclass(frozen=True)
class Run:
    """What a fast form is given beside inputs and states. Inputs are in the computing dtype, 0 where masked."""

    step: Callable[..., tuple[States, Tensor]]
    weights: Inputs
    options: Mapping[str, Any]
    mask: Tensor | None = None
    kernel: str | None = None
    """The name in hf_fwp.kernels.twins that walks; None walks in PyTorch."""

    def walk(
        self,
        inputs: Inputs,
        states: States,
        *,
        step: Callable[..., Any] | None = None,
        weights: Inputs | None = None,
        kernel: str | None = None,
    ) -> tuple[Tensor, States]:
        """One step after the other; `kernel` names the twin of `step` where it is not the rule's."""
        weights = self.weights if weights is None else weights
        if self.kernel is not None:
            from ..kernels.twins import WALKS

            return WALKS[kernel or self.kernel](inputs, states, weights=weights, mask=self.mask, **self.options)
        return walk(step or self.step, inputs, states, weights=weights, mask=self.mask, **self.options)

    def delta(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The delta rule over the whole sequence, chunk by chunk."""
        return self._linear(q, k, v, state, erase=True, beta=beta)

    def sum(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The sum rule over the whole sequence, chunk by chunk."""
        return self._linear(q, k, v, state, erase=False)

    def _linear(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, erase: bool, beta: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        step, backend, size = delta_net.step if erase else linear_attention.step, "torch", v.shape[-1]
        if self.kernel is not None:
            # columns of values know nothing of each other: pieces of them are heads that share a key
            pieces = -(-size // LARGEST)
            v, state = in_pieces(v, pieces).flatten(2, 3), in_pieces(state, pieces).movedim(3, 2).flatten(1, 2)
            beta = beta if beta is None else beta.repeat_interleave(pieces, dim=2)
            backend = "torch" if why_not_triton(q, k, v, beta, state, asked=True) else "triton"
        call = LinearClassCall(step, erase=erase, mask=self.mask, backend=backend)
        out, states = apply_linear_class(call, q, k, v, beta=beta, states={"state": state}, scale=1.0)
        heads, final = k.shape[2], states["state"].unflatten(1, (k.shape[2], -1)).movedim(2, 3).flatten(3)
        return out.unflatten(2, (heads, -1)).flatten(3)[..., :size], final[..., :size]


def in_pieces(x: Tensor, count: int) -> Tensor:
    """The last dimension in `count` equal pieces [..., count, width], with zeros after the last."""
    width = -(-x.shape[-1] // count)
    return torch.nn.functional.pad(x, (0, count * width - x.shape[-1])).unflatten(-1, (count, width))


def walked(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """The fast form of a rule that has no part linear in its state."""
    return run.walk(inputs, states)


def sizes_of_qkv(inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """K and V where the rule takes keys and values."""
    return inputs["k"].shape[-1], inputs["v"].shape[-1]


@dataclass(frozen=True)
class Form:
    """How a rule of this kind computes."""

    rule: Callable[[], Rule]
    """The rule itself, which is not made yet where this is written; it has an `own`, and its step is
    step(states, *, q, k, ..., weights..., options...): one token of every row, [B, HV, size]."""
    resolve: Callable[[Mapping[str, Any] | None], dict[str, Any]] | None = None
    """The options of the step, with their defaults; None where they are the rule's."""
    fast: Callable[[Run, Inputs, States], tuple[Tensor, States]] = field(default=walked)
    sizes: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], tuple[int, int]] = field(default=sizes_of_qkv)
    """sizes(inputs, weights): K and V, read off the arguments."""
    kernel: str | None = None
    """The name in hf_fwp.kernels.twins that walks on a GPU, "linear_class" where nothing has to be walked through."""

    largest: tuple[int, int] = (LARGEST, LARGEST)
    """K and V that the kernel can keep on the chip."""

    def why_not_triton(self, sizes: tuple[int, int], *tensors: Tensor | None, asked: bool = False) -> str | None:
        """The reason why this rule cannot run on these tensors by kernels, or None."""
        if self.kernel is None:
            return f"{self.rule().name} has no kernel"
        for name, size, largest in zip(("keys", "values"), sizes, self.largest, strict=True):
            if size > largest:
                return f"heads have {name} of size {size}, and the kernel goes up to {largest}"
        return why_no_kernel(*(x for x in tensors if x is not None), asked=asked)


def apply_form(
    form: Form,
    *,
    weights: Mapping[str, Tensor] | None = None,
    states: States | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    qk_l2norm: bool = False,
    in_place: bool = False,
    ran: list[str] | None = None,
    **given: Tensor,
) -> tuple[Tensor, States]:
    """Check the arguments, choose the backend and run it. `scale` (1 when left out) multiplies what is returned."""
    rule, states, weights = form.rule(), states or {}, dict(weights or {})
    options = (form.resolve or rule.resolve_options)(options)
    own, inputs = _checked(form, given, weights, states, options, mask=mask, cu_seqlens=cu_seqlens)
    compute = computing_dtype(*inputs.values())
    dtype = given["v" if "v" in given else next(iter(given))].dtype
    inputs = {name: x.to(compute) for name, x in inputs.items()}
    if mask is not None:
        inputs = {name: keep_valid(x, mask) for name, x in inputs.items()}
    if qk_l2norm:
        inputs |= {name: l2_normalize(inputs[name]) for name in ("q", "k")}
    first = next(iter(inputs.values()))
    call = LinearClassCall(rule.step, erase=True, backend=backend, cu_seqlens=cu_seqlens)
    tensors = (*inputs.values(), *weights.values(), *states.values())
    why_not = partial(form.why_not_triton, form.sizes(inputs, weights))
    backend = choose_backend(call, first, *tensors, why_not=why_not)
    weights = {name: x.to(compute) for name, x in weights.items()}
    run = Run(rule.step, weights, options, mask, form.kernel if backend == "triton" else None)
    if ran is not None:
        ran.append(backend)
    started = _started(own, states, first, cu_seqlens)
    with torch.autocast(first.device.type, enabled=False):
        out, final = _run(form, run, inputs, started, backend=backend, cu_seqlens=cu_seqlens)
    if in_place and states and not torch.is_grad_enabled():
        final = {name: states[name].copy_(x) if name in states else x for name, x in final.items()}
    out = out if scale is None or scale == 1 else scale * out
    return (out if mask is None else keep_valid(out, mask)).to(dtype), final


def _checked(
    form: Form,
    given: Mapping[str, Tensor],
    weights: Inputs,
    states: States,
    options: Mapping[str, Any],
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Own, Inputs]:
    """What the rule has at these sizes, and the inputs with one query, key and value per state."""
    rule, inputs = form.rule(), {name: x for name, x in given.items() if x is not None}
    common = (*(("q", "k", "v") if rule.qkv else ()), *rule.inputs)
    missing = [name for name in common if name not in inputs]
    if missing:
        raise ValueError(f"missing argument of {rule.name}: {missing[0]!r}")
    try:
        sizes = form.sizes(inputs, weights)
    except KeyError as absent:
        raise ValueError(f"missing argument of {rule.name}: {absent}") from absent
    assert rule.own is not None
    own = rule.own(*sizes, options)
    if rule.qkv:
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        check_arguments(q, k, v, beta=inputs.get("beta"), g=None, states={}, mask=mask, cu_seqlens=cu_seqlens)
        heads = v.shape[2]
        if q.shape[2] > heads:
            raise ValueError(
                f"q has {q.shape[2]} heads and v {heads}; in {rule.name} the reads are part of the recurrence, so "
                "every state has one query: repeat the values, or use fewer queries"
            )
        inputs |= {name: x.repeat_interleave(heads // x.shape[2], dim=2) for name, x in (("q", q), ("k", k))}
    check_own_arguments(
        rule.name, common, own, inputs=inputs, weights=weights, states=states, mask=mask, cu_seqlens=cu_seqlens
    )
    return own, inputs


def _started(own: Own, states: States, first: Tensor, cu_seqlens: Tensor | None) -> States:
    count = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return {
        name: states[name] if name in states else first.new_zeros(count, first.shape[2], *shape)
        for name, shape in own.states.items()
    }


def _run(
    form: Form, run: Run, inputs: Inputs, states: States, *, backend: str, cu_seqlens: Tensor | None
) -> tuple[Tensor, States]:
    if backend == "step":
        now = {name: x[:, 0] for name, x in inputs.items()}
        new, out = run.step(states, **now, **run.weights, **run.options)
        if run.mask is not None:
            new = {name: keep_valid(x, run.mask[:, 0], states[name]) for name, x in new.items()}
        return out[:, None], new
    if cu_seqlens is None:
        return _whole(form, run, inputs, states, backend)
    length = next(iter(inputs.values())).shape[1]
    rows, valid, back = _rows(cu_seqlens, length)
    if run.mask is not None:
        valid = valid & run.mask[0, rows].bool()
    padded = {name: keep_valid(x[0, rows], valid) for name, x in inputs.items()}
    out, final = _whole(form, replace(run, mask=valid), padded, states, backend)
    return out.flatten(0, 1)[back][None], final


def _whole(form: Form, run: Run, inputs: Inputs, states: States, backend: str) -> tuple[Tensor, States]:
    if backend in ("torch", "triton"):
        return form.fast(run, inputs, states)
    names = set(inputs)

    def step(carried: States, **now: Any) -> tuple[States, Tensor]:
        return run.step(carried, **{n: x for n, x in now.items() if n in names}, **run.weights, **run.options)

    return _recurrence(step, inputs, states, run.mask)


def _recurrence(step: Callable[..., Any], inputs: Inputs, states: States, mask: Tensor | None) -> tuple[Tensor, States]:
    # `recurrence` reads the length off q
    named = inputs if "q" in inputs else inputs | {"q": next(iter(inputs.values()))}
    return recurrence(step, named, states, mask=mask)


@torch.compiler.disable(reason="how many rows packed sequences make is known from the values of cu_seqlens only")
def _rows(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each place of a padded batch [N, L] is found in the packed row, which places are real, and the way back."""
    bounds = sequence_bounds(cu_seqlens, length)
    longest = max(end - start for start, end in bounds)
    starts = torch.tensor([start for start, _ in bounds], device=cu_seqlens.device)
    lengths = torch.tensor([end - start for start, end in bounds], device=cu_seqlens.device)
    place = torch.arange(longest, device=cu_seqlens.device)
    valid = place < lengths[:, None]
    rows = torch.where(valid, starts[:, None] + place, 0)
    return rows, valid, valid.flatten().nonzero()[:, 0]
