"""The linear class on a GPU: four Triton kernels as operators of PyTorch, beside rules/chunked_op.py.

Forward: the inverse of every chunk's triangle, then one scan. Backward: one scan in reverse, then all chunks at once.
Of every chunk the forward leaves the inverse and the state at its start, in the type of the inputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.chunked_op import new_gradients, new_outputs
from .linear_class_backward import gradients, scan_backward
from .linear_class_forward import invert_chunks, scan_forward
from .tiles import dot

CHUNK = 64
WORD = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Launch(NamedTuple):
    """How one kernel is launched: the width of its tiles (value columns; key columns for the inverse), what runs it."""

    columns: int
    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    """One row of the table."""

    invert: Launch
    forward: Launch
    backward: Launch
    gradients: Launch


# By bytes per number and padded head size. Chosen by the memory and registers that the compiler reports for sm_90; not
# yet measured on a device.
TABLE = {
    (2, 64): Launches(Launch(64, 1, 2), Launch(64, 4, 2), Launch(64, 4, 2), Launch(32, 8, 1)),
    (2, 128): Launches(Launch(64, 1, 2), Launch(32, 4, 2), Launch(32, 4, 2), Launch(32, 8, 1)),
    (2, 256): Launches(Launch(64, 1, 2), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    (4, 64): Launches(Launch(32, 1, 2), Launch(32, 4, 1), Launch(32, 4, 1), Launch(16, 8, 1)),
    (4, 128): Launches(Launch(32, 1, 2), Launch(16, 8, 1), Launch(32, 8, 1), Launch(16, 8, 1)),
}
PROGRAMS = 128  # about the multiprocessors of a large GPU: with fewer programs a scan's value columns are split further


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when triton was imported."""
    return not isinstance(dot, triton.JITFunction)


def computing_word(*tensors: Tensor) -> torch.dtype:
    """The type of the operands of products: that of the inputs, float32 when they differ."""
    kinds = {x.dtype for x in tensors}
    return kinds.pop() if len(kinds) == 1 else torch.float32


class Call(NamedTuple):
    """The arguments of all four kernels that do not depend on the kernel."""

    word: torch.dtype  # in which T and the states are kept
    launches: Launches
    slots: int
    pairs: int
    constants: dict[str, Any]
    dynamic: dict[str, int]

    def scan(self, kernel: Any, launch: Launch, *arguments: Tensor | float | None, **flags: Any) -> None:
        width, values = self.width(launch), self.constants["V"]
        while width > 16 and self.pairs * pieces(values, width) < PROGRAMS:
            width //= 2
        programs = self.pairs * pieces(values, width)
        run(kernel, programs, launch, *arguments, self.dynamic["length"], BV=width, **self.constants, **flags)

    def width(self, launch: Launch) -> int:
        return min(launch.columns, padded(self.constants["V"]))


def run(kernel: Any, programs: int, launch: Launch, *arguments: Tensor | float | None, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants, num_warps=launch.num_warps, num_stages=launch.num_stages)


def padded(size: int) -> int:
    """Tiles have sizes that are powers of two, products at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def pieces(size: int, width: int) -> int:
    return -(-size // width)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    erase: bool,
    l2norm: bool,
) -> Call:
    """What the kernels must know about the sizes and which inputs there are."""
    batch, length, heads, key_size = k.shape
    value_heads, value_size = v.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = batch * pieces(length, CHUNK) if cu_seqlens is None else length // CHUNK + sequences
    word = computing_word(q, k, v)
    share = q.shape[2] == heads
    constants = {
        "H": heads,
        "HV": value_heads,
        "R": 1 if share else q.shape[2] // value_heads,
        "SHARE": share,
        "K": key_size,
        "V": value_size,
        "BK": padded(key_size),
        "C": CHUNK,
        "ERASE": erase,
        "HAS_BETA": beta is not None,
        "HAS_G": g is not None,
        "HAS_MASK": mask is not None,
        "PACKED": cu_seqlens is not None,
        "L2NORM": l2norm,
        # numpy has no bf16
        "DOT": tl.float32 if interpreted() else WORD[word],
        # tf32 alone has three correct digits
        "PRECISION": "tf32x3" if torch.version.cuda and not interpreted() else "ieee",
    }
    dynamic = {"length": length, "sequences": sequences, "halvings": sequences.bit_length()}
    launches = TABLE[word.itemsize, max(64, padded(key_size), padded(value_size))]
    return Call(word, launches, slots, sequences * value_heads, constants, dynamic)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.accelerator.device_index(x.device.index) if x.device.type != "cpu" else nullcontext()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("hf_fwp::linear_class_triton_forward", mutates_args=())
def linear_class_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    l2norm: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final state, T of every chunk, state at the start of every chunk)."""
    call = prepare(q, k, v, beta, g, mask, cu_seqlens, erase, l2norm)
    out, final, solve, states = new_results(q, k, v, cu_seqlens, erase, keep)
    q, k, v, beta, g, state, mask, cu_seqlens = contiguous(q, k, v, beta, g, state, mask, cu_seqlens)  # type: ignore[assignment]
    with device_of(v):
        if erase:
            launch, names = call.launches.invert, ("H", "HV", "K", "HAS_BETA", "HAS_G", "HAS_MASK", "PACKED", "L2NORM")
            chosen = {name: call.constants[name] for name in (*names, "DOT", "PRECISION")}
            chosen |= {"KB": min(launch.columns, call.constants["BK"])}
            tensors = (k, beta, g, mask, cu_seqlens, solve)
            run(invert_chunks, call.slots * v.shape[2], launch, *tensors, *call.dynamic.values(), **chosen)
        call.scan(
            scan_forward, call.launches.forward, q, k, v, beta, g, mask, cu_seqlens, state, solve, out, final, states,
            scale, HAS_STATE=state is not None, KEEP=keep,
        )  # fmt: skip
    return out, final, solve if keep else solve.new_empty(0), states


def new_results(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, erase: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for what the forward gives, T [slots, HV, C, C] and S0 [slots, HV, K, V] included."""
    batch, length, _, key_size = k.shape
    value_heads, value_size = v.shape[2:]
    out, final, _ = new_outputs(q, k, v, cu_seqlens, erase=False, keep=False)
    chunks = batch * pieces(length, CHUNK) if cu_seqlens is None else length // CHUNK + cu_seqlens.shape[0] - 1
    word = computing_word(q, k, v)
    solve = v.new_empty(chunks if erase else 0, value_heads, CHUNK, CHUNK, dtype=word)
    return out, final, solve, v.new_empty(chunks if keep else 0, value_heads, key_size, value_size, dtype=word)


@linear_class_forward.register_fake
def _(q, k, v, beta, g, state, mask, cu_seqlens, scale, erase, l2norm, keep):
    out, final, solve, states = new_results(q, k, v, cu_seqlens, erase, keep)
    return out, final, solve if keep else solve.new_empty(0), states


@torch.library.custom_op("hf_fwp::linear_class_triton_backward", mutates_args=())
def linear_class_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    solve: Tensor,
    states: Tensor,
    scale: float,
    erase: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and the initial state; empty for an absent beta or g."""
    call = prepare(q, k, v, beta, g, mask, cu_seqlens, erase, l2norm)
    (dq, dk, dv, d_beta, d_g), d_initial = new_gradients(q, k, v, beta, g, cu_seqlens)
    per_reader = {name: readers_of(call, x) for name, x in (("q", dq), ("k", dk), ("g", d_g))}
    d_states = torch.empty_like(states)
    q, k, v, beta, g, mask, cu_seqlens = contiguous(q, k, v, beta, g, mask, cu_seqlens)  # type: ignore[assignment]
    d_out, d_final = contiguous(d_out, d_final)  # type: ignore[assignment]
    # without β what was written is v, and its gradient that of v
    d_written = dv if beta is None else torch.empty_like(v)
    readers = v.shape[2] * call.constants["R"]
    launch = call.launches.gradients
    with device_of(v):
        call.scan(
            scan_backward, call.launches.backward, q, k, beta, g, mask, cu_seqlens, solve, d_out, d_final, d_initial,
            d_states, d_written, scale, HAS_FINAL=d_final is not None,
        )  # fmt: skip
        run(
            gradients, call.slots * readers, launch, q, k, v, beta, g, mask, cu_seqlens, solve, states, d_states,
            d_written, d_out, per_reader["q"], per_reader["k"], dv, d_beta, per_reader["g"], scale,
            *call.dynamic.values(), BV=call.width(launch), **call.constants,
        )  # fmt: skip
    for total, parts in ((dq, per_reader["q"]), (dk, per_reader["k"]), (d_g, per_reader["g"])):
        if parts is not total:
            total.copy_(parts.unflatten(2, (total.shape[2], -1)).sum(3))
    return dq, dk, dv, d_beta, d_g, d_initial


def readers_of(call: Call, gradient: Tensor) -> Tensor:
    """Room for every query head's share in a gradient [B, T, heads, ...]; the gradient itself if each has its own."""
    readers = call.constants["HV"] * call.constants["R"]
    if gradient.ndim < 3 or gradient.shape[2] == readers:
        return gradient
    return gradient.new_empty(*gradient.shape[:2], readers, *gradient.shape[3:], dtype=torch.float32)


@linear_class_backward.register_fake
def _(d_out, d_final, q, k, v, beta, g, mask, cu_seqlens, solve, states, scale, erase, l2norm):
    grads, d_initial = new_gradients(q, k, v, beta, g, cu_seqlens)
    return *grads, d_initial


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, g, state, mask, cu_seqlens, ctx.scale, ctx.erase, ctx.l2norm, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(q, k, v, beta, g, mask, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, mask, cu_seqlens, solve, states = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(new_outputs(q, k, v, cu_seqlens, erase=False, keep=False)[0].shape)
    dq, dk, dv, d_beta, d_g, d_state = linear_class_backward(
        d_out, d_final, q, k, v, beta, g, mask, cu_seqlens, solve, states, ctx.scale, ctx.erase, ctx.l2norm
    )
    optional = (
        d_beta if beta is not None else None,
        d_g if g is not None else None,
        d_state if ctx.has_state else None,
    )
    return dq, dk, dv, *optional, None, None, None, None, None, None


linear_class_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state. The backward's share is kept only when a gradient will be asked for."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, state))
    out, final, *_ = linear_class_forward(q, k, v, beta, g, state, mask, cu_seqlens, scale, erase, l2norm, keep)
    return out, final
