"""A recurrence that no chunk can shorten, on a GPU: one program per sequence and head walks through the whole of it.

The state stays in the program's registers from the first token to the last. A rule supplies a `Twin`: how its state is
loaded and stored, one step, and that step's backward; the loops over time stand here, once. For the backward the
forward leaves the states every C steps; a segment is walked through again from its first state, which leaves all its
states in a scratch of C states per program, and then backwards. With T steps that is T/C + C states.

Everything is float32 and packed: the inputs of a token lie side by side in x [N, T, H, ·], the weights of a head in
w [H, ·], the states of a head in s [N, H, ·]. A masked token is not looked at.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.walk import segment_length
from .linear_class import device_of, padded

UNSPECIALIZED = ["length", "heads", "segment", "segments"]  # a new length must not mean a new compilation
FLOATS_PER_WARP = 1024  # of the padded state: 32 registers of every thread


class Twin(NamedTuple):
    """A rule's step in Triton. The functions get K, V, their powers of two BK, BV, and the rule's numbers OPT."""

    load: Any
    """load(s, K, V, BK, BV) -> state, a tuple of tiles"""
    store: Any
    """store(s, state, K, V, BK, BV)"""
    step: Any
    """step(state, x, w, K, V, BK, BV, OPT) -> state, out [BV]"""
    back: Any
    """back(state before, d_state, d_out, x, w, d_x, note, K, V, BK, BV, OPT) -> d_state before; it stores d_x and what
    the gradient of the weights needs of this token"""
    tiles: Callable[[int, int], int]
    """tiles(BK, BV): the numbers of a padded state"""
    notes: Callable[[int, int], int] = lambda key_size, value_size: 0
    """notes(K, V): the numbers that `back` notes of one token"""
    of_weights: Callable[[Tensor, Tensor, int, int], Tensor] | None = None
    """of_weights(note, d_x, K, V) -> gradient of w; None where a rule has no weights"""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def walk_forward(
    x, w, initial, mask, out, final, kept, length, heads, segment, segments,
    WX: tl.constexpr, WW: tl.constexpr, WS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr, HAS_MASK: tl.constexpr, KEEP: tl.constexpr,
    LOAD: tl.constexpr, STORE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Outputs and final state of one sequence and head; with KEEP the states that segments start from."""
    pair = tl.program_id(0).to(tl.int64)
    n, h = pair // heads, pair % heads
    columns = tl.arange(0, BV)
    state = LOAD(initial + pair * WS, K, V, BK, BV)
    for t in range(length):
        if KEEP:  # noqa: SIM102 the compiler knows it
            if t % segment == 0:
                STORE(kept + (pair * segments + t // segment) * WS, state, K, V, BK, BV)
        at = (n * length + t) * heads + h
        valid = True
        if HAS_MASK:
            valid = tl.load(mask + n * length + t) != 0
        read = tl.zeros([BV], tl.float32)
        if valid:
            state, read = STEP(state, x + at * WX, w + h * WW, K, V, BK, BV, OPT)
        tl.store(out + at * V + columns, read, mask=columns < V)
    STORE(final + pair * WS, state, K, V, BK, BV)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def walk_backward(
    x, w, kept, mask, d_out, d_final, d_x, d_initial, note, scratch, length, heads, segment, segments,
    WX: tl.constexpr, WW: tl.constexpr, WS: tl.constexpr, WN: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr, HAS_MASK: tl.constexpr,
    LOAD: tl.constexpr, STORE: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs and of the initial state of one sequence and head, and the notes of every token."""
    pair = tl.program_id(0).to(tl.int64)
    n, h = pair // heads, pair % heads
    columns = tl.arange(0, BV)
    states = scratch + pair * segment * WS
    d_state = LOAD(d_final + pair * WS, K, V, BK, BV)
    for number in range(segments):
        first = (segments - 1 - number) * segment
        steps = tl.minimum(segment, length - first)
        state = LOAD(kept + (pair * segments + segments - 1 - number) * WS, K, V, BK, BV)
        for i in range(steps):
            STORE(states + i * WS, state, K, V, BK, BV)
            at = (n * length + first + i) * heads + h
            valid = i < steps - 1
            if HAS_MASK:
                valid = valid & (tl.load(mask + n * length + first + i) != 0)
            if valid:
                state, _ = STEP(state, x + at * WX, w + h * WW, K, V, BK, BV, OPT)
        # what one thread has stored another may load
        tl.debug_barrier()
        for i in range(steps):
            t = first + steps - 1 - i
            at = (n * length + t) * heads + h
            valid = True
            if HAS_MASK:
                valid = tl.load(mask + n * length + t) != 0
            if valid:
                before = LOAD(states + (t - first) * WS, K, V, BK, BV)
                d_read = tl.load(d_out + at * V + columns, mask=columns < V, other=0.0)
                d_state = BACK(
                    before, d_state, d_read, x + at * WX, w + h * WW, d_x + at * WX, note + at * WN,
                    K, V, BK, BV, OPT,
                )  # fmt: skip
        tl.debug_barrier()
    STORE(d_initial + pair * WS, d_state, K, V, BK, BV)


def twin_of(name: str) -> Twin:
    """The rule's own module beside this one."""
    return importlib.import_module(f".{name}", __package__).TWIN


def constants_of(
    twin: Twin, x: Tensor, w: Tensor, s: Tensor, sizes: Sequence[int], numbers: Sequence[float], **own: Any
) -> dict[str, Any]:
    """What both kernels must know of the rule and of the sizes, and what one of them has of its own."""
    key_size, value_size = sizes
    block_k, block_v = padded(key_size), padded(value_size)
    warps = twin.tiles(block_k, block_v) // FLOATS_PER_WARP
    return {
        "WX": x.shape[-1],
        "WW": w.shape[-1],
        "WS": s.shape[-1],
        "K": key_size,
        "V": value_size,
        "BK": block_k,
        "BV": block_v,
        "OPT": tuple(int(a) if a.is_integer() else a for a in numbers),  # loops count in whole numbers
        "LOAD": twin.load,
        "STORE": twin.store,
        "STEP": twin.step,
        "num_warps": min(16, max(4, warps and 1 << (warps.bit_length() - 1))),
        "num_stages": 1,
        **own,
    }


@torch.library.custom_op("hf_fwp::walk_triton_forward", mutates_args=())
def forward(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    mask: Tensor | None,
    name: str,
    sizes: Sequence[int],
    numbers: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [N, T, H, V], final states [N, H, ·], states at the start of every segment)."""
    out, final, kept = new_results(x, w, s, sizes, keep)
    length, segment = x.shape[1], segment_length(x.shape[1])
    x, w, s = x.contiguous(), w.contiguous(), s.contiguous()
    with device_of(x):
        walk_forward[(s.shape[0] * s.shape[1],)](
            x, w, s, None if mask is None else mask.contiguous(), out, final, kept,
            length, s.shape[1], segment, -(-length // segment),
            **constants_of(twin_of(name), x, w, s, sizes, numbers, HAS_MASK=mask is not None, KEEP=keep),
        )  # fmt: skip
    return out, final, kept


def new_results(x: Tensor, w: Tensor, s: Tensor, sizes: Sequence[int], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what the forward gives."""
    segments = -(-x.shape[1] // segment_length(x.shape[1])) if keep else 0
    out = x.new_empty(*x.shape[:3], sizes[1])
    return out, s.new_empty(s.shape), s.new_empty(*s.shape[:2], segments, s.shape[2])


@forward.register_fake
def _(x, w, s, mask, name, sizes, numbers, keep):
    return new_results(x, w, s, sizes, keep)


@torch.library.custom_op("hf_fwp::walk_triton_backward", mutates_args=())
def backward(
    d_out: Tensor,
    d_final: Tensor,
    x: Tensor,
    w: Tensor,
    kept: Tensor,
    mask: Tensor | None,
    name: str,
    sizes: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and s."""
    twin, (heads, width) = twin_of(name), kept.shape[1::2]
    length, segment = x.shape[1], segment_length(x.shape[1])
    # the backward of a step does not see masked tokens
    fresh = x.new_zeros if mask is not None else x.new_empty
    notes = twin.notes(*sizes)
    d_x, note = fresh(x.shape), fresh(*x.shape[:3], notes)
    d_initial = x.new_empty(x.shape[0], heads, width)
    scratch = x.new_empty(x.shape[0], heads, segment, width)
    with device_of(x):
        walk_backward[(x.shape[0] * heads,)](
            x.contiguous(), w.contiguous(), kept, None if mask is None else mask.contiguous(),
            d_out.contiguous(), d_final.contiguous(), d_x, d_initial, note, scratch,
            length, heads, segment, -(-length // segment),
            **constants_of(twin, x, w, kept, sizes, numbers, HAS_MASK=mask is not None, BACK=twin.back, WN=notes),
        )  # fmt: skip
    d_w = torch.zeros_like(w) if twin.of_weights is None else twin.of_weights(note, d_x, *sizes)
    return d_x, d_w, d_initial


@backward.register_fake
def _(d_out, d_final, x, w, kept, mask, name, sizes, numbers):
    return x.new_empty(x.shape), w.new_empty(w.shape), kept.new_empty(*kept.shape[:2], kept.shape[3])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, _, mask, ctx.name, ctx.sizes, ctx.numbers, _ = inputs
    ctx.save_for_backward(x, w, mask, output[2])


def _backward(ctx: Any, d_out: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, w, mask, kept = ctx.saved_tensors
    found = backward(d_out, d_final, x, w, kept, mask, ctx.name, ctx.sizes, ctx.numbers)
    return *found, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_keep_for_backward)


def walk(
    name: str,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    *,
    sizes: Sequence[int],
    mask: Tensor | None,
    numbers: Sequence[float] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Walk with the twin in the module `name`: (outputs, states after the last token).

    inputs [N, T, H, ...], weights [H, ...], states [N, H, ...], sizes K and V. The numbers are part of the kernel.
    """
    x = torch.cat([a.flatten(3) for a in inputs], dim=-1)
    w = torch.cat([a.flatten(1) for a in weights], dim=-1) if weights else x.new_zeros(x.shape[2], 0)
    s = torch.cat([a.flatten(2) for a in states], dim=-1)
    keep = torch.is_grad_enabled() and any(a.requires_grad for a in (x, w, s))
    out, final, _ = forward(x, w, s, mask, name, sizes, [float(a) for a in numbers], keep)
    parts = final.split([a[0, 0].numel() for a in states], dim=-1)
    return out, [part.reshape(a.shape) for part, a in zip(parts, states, strict=True)]
