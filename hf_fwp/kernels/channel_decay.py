"""The general linear rule with a decay for every key channel on a GPU: four Triton kernels as operators of PyTorch.

    S̃_t = Diag(exp(g_t)) S_{t-1};   r_t = β_t (v_t - S̃_tᵀ e_t);   S_t = S̃_t + k_t ⊗ r_t;   o_t = scale · S_tᵀ q_t

Forward: the inverse of every chunk's triangle and its products with the queries, then one scan. Backward: one scan in
reverse, then all chunks at once. Of every chunk the forward leaves both squares and the state at its start, in
the type of the inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rules.chunked_op import new_gradients, new_outputs
from .channel_decay_backward import gradients, scan_backward
from .channel_decay_forward import prepare_chunks, scan_forward
from .linear_class import INVERSE, WORD, contiguous, device_of, interpreted
from .linear_class_launches import Launch, computing_word, padded, pieces


class Launches(NamedTuple):
    """One row of the table."""

    chunk: int
    prepare: Launch
    forward: Launch
    backward: Launch
    gradients: Launch


# By bytes per number and padded head size. Chosen by the memory and registers that the compiler reports for sm_90; not
# yet measured on a device. Shorter chunks take less of both, but leave more states to the backward.
TABLE = {
    (2, 64): Launches(64, Launch(32, 4, 1), Launch(64, 4, 1), Launch(64, 4, 1), Launch(32, 8, 1)),
    (2, 128): Launches(64, Launch(32, 4, 1), Launch(32, 8, 1), Launch(32, 8, 1), Launch(32, 8, 1)),
    (2, 256): Launches(64, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 8, 1)),
    (4, 64): Launches(32, Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 8, 1)),
    (4, 128): Launches(32, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 8, 1)),
    (4, 256): Launches(16, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 4, 1)),
}
PROGRAMS = 128  # about the multiprocessors of a large GPU: with fewer programs a scan's value columns are split further
NARROW = 16  # value columns


class Call(NamedTuple):
    """The arguments of all four kernels that do not depend on the kernel."""

    launches: Launches
    slots: int
    pairs: int
    readers: int
    constants: dict[str, Any]
    dynamic: dict[str, int]

    def run(
        self, kernel: Any, programs: int, launch: Launch, *arguments: Tensor | float | None, **constants: Any
    ) -> None:
        """Launch it with those of the constants that it has."""
        known = self.constants | constants
        chosen = {name: known[name] for name in kernel.arg_names if name in known}
        kernel[(programs,)](*arguments, **chosen, num_warps=launch.num_warps, num_stages=launch.num_stages)

    def scan(self, kernel: Any, launch: Launch, *arguments: Tensor | float | None, **flags: Any) -> None:
        """One program for every sequence, value head and tile of value columns."""
        width = self.width(launch)
        while width > NARROW and self.pairs * pieces(self.constants["V"], width) < PROGRAMS:
            width //= 2
        programs = self.pairs * pieces(self.constants["V"], width)
        self.run(kernel, programs, launch, *arguments, self.dynamic["length"], BV=width, **flags)

    def every_chunk(self, kernel: Any, launch: Launch, *arguments: Tensor | float | None, **flags: Any) -> None:
        """One program for every chunk and query head."""
        widths = {"KB": min(launch.columns, self.constants["BK"]), "BV": self.width(launch)}
        self.run(kernel, self.slots * self.readers, launch, *arguments, *self.dynamic.values(), **widths, **flags)

    def width(self, launch: Launch) -> int:
        return min(launch.columns, padded(self.constants["V"]))


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    l2norm: bool,
) -> Call:
    """What the kernels must know about the sizes and which inputs there are."""
    batch, length, heads, _ = k.shape
    value_heads = v.shape[2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    word = word_of(q, k, v, erase)
    launches = launches_of(word, k, v)
    share = q.shape[2] == heads
    queries = 1 if share else q.shape[2] // value_heads
    constants = {
        "H": heads,
        "HV": value_heads,
        "R": queries,
        "SHARE": share,
        "K": k.shape[3],
        "V": v.shape[3],
        "BK": padded(k.shape[3]),
        "C": launches.chunk,
        "LEVELS": launches.chunk.bit_length() - 1,
        "GK": 0 if g is None else g.shape[-1],
        "HAS_ERASE": erase is not None,
        "HAS_BETA": beta is not None,
        "HAS_MASK": mask is not None,
        "PACKED": cu_seqlens is not None,
        "L2NORM": l2norm,
        "DOT": WORD[word],
        # tf32 alone has three correct digits
        "PRECISION": "tf32x3" if torch.version.cuda and not interpreted() else "ieee",
    }
    dynamic = {"length": length, "sequences": sequences, "halvings": sequences.bit_length()}
    slots = slots_of(launches.chunk, k, cu_seqlens)
    return Call(launches, slots, sequences * value_heads, value_heads * queries, constants, dynamic)


def word_of(*tensors: Tensor | None) -> torch.dtype:
    """The type of the operands of products, and of what is kept of every chunk."""
    return computing_word(*(x for x in tensors if x is not None))


def launches_of(word: torch.dtype, k: Tensor, v: Tensor) -> Launches:
    return TABLE[word.itemsize, max(64, padded(k.shape[3]), padded(v.shape[3]))]


def slots_of(chunk: int, k: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many slots (tiles.py) the chunks have."""
    batch, length = k.shape[:2]
    return batch * pieces(length, chunk) if cu_seqlens is None else length // chunk + cu_seqlens.shape[0] - 1


def new_results(
    q: Tensor, k: Tensor, v: Tensor, erase: Tensor | None, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors: outputs, final state, T [slots, HV, C, C], P [slots, HV·R, C, C] and S0 [slots, HV, K, V]."""
    out, final, _ = new_outputs(q, k, v, cu_seqlens, erase=False, keep=False)
    word = word_of(q, k, v, erase)
    chunk = launches_of(word, k, v).chunk
    slots, square = slots_of(chunk, k, cu_seqlens), (chunk, chunk)
    solve = v.new_empty(slots, v.shape[2], *square, dtype=INVERSE[word])
    reads = v.new_empty(slots, out.shape[2], *square, dtype=word)
    return out, final, solve, reads, v.new_empty(slots if keep else 0, *final.shape[1:], dtype=word)


def kept(results: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results, without T and P when no backward will ask for them."""
    out, final, solve, reads, states = results
    return (out, final, solve, reads, states) if keep else (out, final, out.new_empty(0), out.new_empty(0), states)


@torch.library.custom_op("hf_fwp::channel_decay_triton_forward", mutates_args=())
def channel_decay_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, final state; and of every chunk T, P and the state at its start)."""
    call = prepare(q, k, v, erase, beta, g, mask, cu_seqlens, l2norm)
    results = out, final, solve, reads, states = new_results(q, k, v, erase, cu_seqlens, keep)
    q, k, v, erase, beta, g, state, mask, cu_seqlens = contiguous(q, k, v, erase, beta, g, state, mask, cu_seqlens)  # type: ignore[assignment]
    with device_of(v):
        call.every_chunk(
            prepare_chunks, call.launches.prepare, q, k, erase, beta, g, mask, cu_seqlens, solve, reads, scale,
            HAS_READS=True,
        )  # fmt: skip
        call.scan(
            scan_forward, call.launches.forward, q, k, erase, v, beta, g, mask, cu_seqlens, state, solve, reads, out,
            final, states, scale, HAS_STATE=state is not None, HAS_READS=True, KEEP=keep,
        )  # fmt: skip
    return kept(results, keep)


@channel_decay_forward.register_fake
def _(q, k, v, erase, beta, g, state, mask, cu_seqlens, scale, l2norm, keep):
    return kept(new_results(q, k, v, erase, cu_seqlens, keep), keep)


@torch.library.custom_op("hf_fwp::channel_decay_triton_backward", mutates_args=())
def channel_decay_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    solve: Tensor,
    reads: Tensor,
    states: Tensor,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, erase, beta, g and the initial state; empty for what is absent."""
    call = prepare(q, k, v, erase, beta, g, mask, cu_seqlens, l2norm)
    dq, dk, dv, d_erase, d_beta, d_g, d_initial = new_results_backward(q, k, v, erase, beta, g, cu_seqlens)
    shares = [share_of_readers(x, call.readers) for x in (dq, dk, d_erase, d_g)]
    d_states, written = torch.empty_like(states), torch.empty_like(d_out, memory_format=torch.contiguous_format)
    q, k, v, erase, beta, g, mask, cu_seqlens = contiguous(q, k, v, erase, beta, g, mask, cu_seqlens)  # type: ignore[assignment]
    d_out, d_final = contiguous(d_out, d_final)  # type: ignore[assignment]
    # without β the gradient of what was written is that of v
    d_written = dv if beta is None else torch.empty_like(v)
    with device_of(v):
        call.scan(
            scan_backward, call.launches.backward, q, k, erase, beta, g, mask, cu_seqlens, solve, reads, d_out, d_final,
            d_initial, d_states, d_written, scale, HAS_FINAL=d_final is not None,
        )  # fmt: skip
        call.every_chunk(
            gradients, call.launches.gradients, q, k, erase, v, beta, g, mask, cu_seqlens, solve, reads, states,
            d_states, d_written, d_out, written, shares[0], shares[1], shares[2], dv, d_beta, shares[3], scale,
        )  # fmt: skip
    for total, parts in zip((dq, dk, d_erase, d_g), shares, strict=True):
        if parts is not total:
            total.copy_(parts.unflatten(2, (total.shape[2], -1)).sum(3))
    return dq, dk, dv, d_erase, d_beta, d_g, d_initial


def new_results_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """Empty tensors for the gradients."""
    (dq, dk, dv, d_beta, d_g), d_initial = new_gradients(q, k, v, beta, g, cu_seqlens)
    d_erase = v.new_empty(0) if erase is None else erase.new_empty(erase.shape)
    return dq, dk, dv, d_erase, d_beta, d_g, d_initial


def share_of_readers(gradient: Tensor, readers: int) -> Tensor:
    """Room for every query head's share in a gradient [B, T, heads, ...]; the gradient itself if each has its own."""
    if gradient.ndim < 3 or gradient.shape[2] == readers:
        return gradient
    return gradient.new_empty(*gradient.shape[:2], readers, *gradient.shape[3:], dtype=torch.float32)


@channel_decay_backward.register_fake
def _(d_out, d_final, q, k, v, erase, beta, g, mask, cu_seqlens, solve, reads, states, scale, l2norm):
    return new_results_backward(q, k, v, erase, beta, g, cu_seqlens)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, erase, beta, g, state, mask, cu_seqlens, ctx.scale, ctx.l2norm, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(q, k, v, erase, beta, g, mask, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, erase, beta, g, mask, cu_seqlens, solve, reads, states = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(new_outputs(q, k, v, cu_seqlens, erase=False, keep=False)[0].shape)
    dq, dk, dv, *optional, d_state = channel_decay_backward(
        d_out, d_final, q, k, v, erase, beta, g, mask, cu_seqlens, solve, reads, states, ctx.scale, ctx.l2norm
    )
    given = (None if x is None else dx for x, dx in zip((erase, beta, g), optional, strict=True))
    return dq, dk, dv, *given, d_state if ctx.has_state else None, None, None, None, None, None


channel_decay_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state. k [B,T,H,K] is written to, e = `erase` [B,T,HV,K] (k without it) erased along, at the
    rate beta [B,T,HV]; g is [B,T,HV,K], or [B,T,HV,1] for one decay per head.

    With `l2norm` q and k have length 1; this needs e = k and one query per state.
    The backward's share is kept only when a gradient will be asked for.
    """
    tensors = (q, k, v, erase, beta, g, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out, final, *_ = channel_decay_forward(q, k, v, erase, beta, g, state, mask, cu_seqlens, scale, l2norm, keep)
    return out, final
