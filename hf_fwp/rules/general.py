"""The general linear rule, parallel over the tokens of a chunk: its own write key, erase vector and channel decay.

    S̃_t = Diag(exp(g_t)) S_{t-1};   r_t = u_t - S̃_tᵀ e_t;   S_t = S̃_t + w_t ⊗ r_t;   o_t = S_tᵀ q_t

Inside a chunk of C tokens that starts from the state S0, with G the inclusive cumulative sum of g:

    A_ij = Σ_d e_i w_j exp(G_i - G_j), i > j      P_ij = Σ_d q_i w_j exp(G_i - G_j), i ≥ j
    R  = (I + A)⁻¹ (U - (E ⊙ exp(G)) S0)          O = (Q ⊙ exp(G)) S0 + P R
    S1 = Diag(exp(G_C)) S0 + (W ⊙ exp(G_C - G))ᵀ R

A transposed form (Oja) keeps M = Sᵀ and reads the other side:

    o_i = exp(G_i) ⊙ (M0 q_i) + Σ_{j≤i} (q_i · r_j) exp(G_i - G_j) ⊙ w_j

Only R and S1 wait for the chunk before. Autograd keeps one state per chunk. Where w = k, e = βk, u = βv and the decay
is one number per head, chunked.py does the same faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import blocks
from .channel_decay import mix, products
from .gating import LOWEST


@dataclass(frozen=True)
class Form:
    """What a rule does with a token, in the letters above; every state has its own."""

    q: Tensor  # [B, T, HV, R, K], scaled
    w: Tensor  # [B, T, HV, K]
    e: Tensor
    u: Tensor  # [B, T, HV, V]
    g: Tensor | None  # [B, T, HV, K] or [B, T, HV, 1]
    transposed: bool = False  # M = Sᵀ: w, e and g have size V, u has size K
    rate: Tensor | None = None  # [B, T, HV], multiplies e and u
    erase: Tensor | None = None  # [B, T, HV, K], multiplies e
    write: Tensor | None = None  # [B, T, HV, V], multiplies u

    def rated(self) -> tuple[Tensor, Tensor]:
        """e and u at their rate."""
        e = self.e if self.erase is None else self.erase * self.e
        u = self.u if self.write is None else self.write * self.u
        if self.rate is None:
            return e, u
        rate = self.rate.unsqueeze(-1)
        return rate * e, rate * u


def run_form(form: Form, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Reads [B, T, HV, R, V] and the state after the last token, in the dtype of the state."""
    length = form.w.shape[1]
    longest = blocks.chunk_length(form.w.shape[-1], form.u.shape[-1])
    chunk = min(longest, 1 << (length - 1).bit_length())
    q, w, e, u = (in_chunks(x, chunk) for x in (form.q, form.w, *form.rated()))
    state = (state_BHKV.mT if form.transposed else state_BHKV).flatten(0, 1)
    total = None if form.g is None else summed(in_chunks(form.g, chunk))
    scores = decayed(e if form.transposed else torch.cat([e, q], dim=2), w, total)
    decay = None if total is None else total.exp()
    erased = e if decay is None else e * decay
    both = torch.cat([u, erased], dim=-1).squeeze(2)
    solved = torch.linalg.solve_triangular(scores[:, :, 0], both, upper=False, unitriangular=True)
    remaining = w if total is None else w * (total[..., -1:, :] - total).exp()
    left = None if decay is None else decay[..., 0, -1, :, None]
    target, weights = solved.split([u.shape[-1], e.shape[-1]], dim=-1)
    before, written, state = scan(target, weights, remaining.squeeze(2), left, state)
    if form.transposed:
        out = q @ before.mT.unsqueeze(2)
        out = (out if decay is None else out * decay) + spread((q @ written.mT.unsqueeze(2)).tril(), w, total)
    else:
        met = q if decay is None else q * decay
        out = met @ before.unsqueeze(2) + scores[:, :, 1:] @ written.unsqueeze(2)
    state_BHKV = state.view(*state_BHKV.shape[:2], *state.shape[1:])
    out_BTHRV = from_chunks(out, state_BHKV.shape[0], state_BHKV.shape[1], length)
    return out_BTHRV, state_BHKV.mT if form.transposed else state_BHKV


def scan(
    target: Tensor, weights: Tensor, keys: Tensor, left: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From chunk to chunk: the states before [N, P, K, V], what is written [N, P, C, V], the last state."""
    before, written = [], []
    decays = [None] * len(target) if left is None else left.unbind()
    # unbind: the gradient of an index would be a tensor of zeros as large as all chunks, for every chunk
    for u, e, w, decay in zip(target.unbind(), weights.unbind(), keys.unbind(), decays, strict=True):
        before.append(state)
        written.append(torch.baddbmm(u, e, state, alpha=-1))
        state = torch.baddbmm(state if decay is None else decay * state, w.mT, written[-1])
    return torch.stack(before), torch.stack(written), state


def run_kernels(
    form: Form,
    state_BHKV: Tensor | None,
    word: torch.dtype,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Reads [B, T, HQ, V] and the state after the last token, by Triton; products have operands of type `word`.

    Unlike in `run_form`, q may be [B, T, HQ, K] and w [B, T, H, K], and the kernels scale q, bring it and w to length 1
    and compute gates. That needs e = w, and not a transposed form.
    """
    q = form.q.flatten(2, 3) if form.q.ndim == 5 else form.q
    tensors = (q.to(word), form.w.to(word), form.u.to(word))
    erase = form.erase if form.e is form.w else form.e.to(word)
    rates: Any = {"erase": erase, "write": form.write, "beta": form.rate, "g": form.g, "cu_seqlens": cu_seqlens}
    rates["erase_gates"] = form.erase is not None
    call = {"state": state_BHKV, "mask": mask, "scale": scale, "l2norm": l2norm, "across": form.transposed}
    from ..kernels.channel_decay import chunked

    return chunked(*tensors, **rates, **call)


def run_decode(
    form: Form,
    state_BHKV: Tensor | None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    l2norm: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token, [B, 1, HQ, V], and the state after it, by one launch of Triton; tensors as in `run_kernels`. Not for a
    transposed form."""
    q = form.q.flatten(2, 3) if form.q.ndim == 5 else form.q
    u = form.u if form.write is None else form.write * form.u
    gated = form.erase is not None and form.e is form.w
    along = form.erase if gated else None if form.e is form.w else form.e
    call = {"along": along, "gated": gated, "state": state_BHKV, "mask": mask, "scale": scale, "l2norm": l2norm}
    from ..kernels.decode import decode_step

    return decode_step(q, form.w, u, beta=form.rate, g=form.g, erase=True, in_place=in_place, **call)


def decayed_sums(x_BTHD: Tensor, g_BTH: Tensor, start_BHD: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(g_t) h_{t-1} + x_t for every token, and the last one; 64 tokens at once."""
    batch, length = x_BTHD.shape[:2]
    x, total = in_chunks(x_BTHD, 64), summed(in_chunks(g_BTH.unsqueeze(-1), 64))
    within, decay = gamma(total) @ x, total.exp()
    last, parts = start_BHD.flatten(0, 1)[:, None, None], []
    for own, left in zip(within.unbind(), decay.unbind(), strict=True):
        parts.append(own + left * last)
        last = parts[-1][..., -1:, :]
    return from_chunks(torch.stack(parts), batch, x_BTHD.shape[2], length).squeeze(3), last.reshape(start_BHD.shape)


def summed(g: Tensor) -> Tensor:
    """G, the sum of g over the tokens of a chunk. The backward keeps a mask of g instead of g."""
    lowest = LOWEST[g.dtype]
    return g.masked_fill(g < lowest, lowest).cumsum(-2)


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] or [B, T, H, R, D] as [chunks, B * H, R or 1, C, D]; zeros after the last token change nothing."""
    x = x.unsqueeze(3) if x.ndim == 4 else x
    batch, length, heads, queries, size = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -length % chunk))
    chunks = x.shape[1] // chunk
    x = x.view(batch, chunks, chunk, heads, queries, size).permute(1, 0, 3, 4, 2, 5)
    return x.reshape(chunks, batch * heads, queries, chunk, size)


def from_chunks(x: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """[chunks, B * H, R, C, D] as [B, T, H, R, D]."""
    chunks, _, queries, chunk, size = x.shape
    x = x.view(chunks, batch, heads, queries, chunk, size).permute(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, chunks * chunk, heads, queries, size)[:, :length]


def decayed(x: Tensor, y: Tensor, total: Tensor | None) -> Tensor:
    """Σ_d x_i y_j exp(G_i - G_j) for i ≥ j, else 0."""
    if total is None:
        return (x @ y.mT).tril()
    return products(x, y, total) if total.shape[-1] > 1 else x @ y.mT * gamma(total)


def spread(weights: Tensor, y: Tensor, total: Tensor | None) -> Tensor:
    """Σ_{j≤i} M_ij exp(G_i - G_j) ⊙ y_j; the weights are 0 above the diagonal."""
    if total is None:
        return weights @ y
    return mix(weights, y, total) if total.shape[-1] > 1 else (weights * gamma(total)) @ y


def gamma(total: Tensor) -> Tensor:
    """exp(G_i - G_j) for i ≥ j, else 0; the exponent is cut off before exp, where it would overflow."""
    above = torch.ones(total.shape[-2], total.shape[-2], dtype=torch.bool, device=total.device).triu(1)
    return (total - total.mT).masked_fill(above, -torch.inf).exp()


def run_token(form: Form, state_BHKV: Tensor, *, kernel: bool) -> Tensor:
    """One token: reads [B, 1, HV, R, V]; the state is changed in place, by a kernel where there is one."""
    if kernel and not form.transposed:
        return run_decode(form, state_BHKV, in_place=True)[0].unflatten(2, form.q.shape[2:4])
    state = state_BHKV.mT if form.transposed else state_BHKV
    w, e, u = (x[:, 0].unsqueeze(2) for x in (form.w, *form.rated()))
    if form.g is not None:
        state.mul_(form.g[:, 0].exp().unsqueeze(-1))
    state.addcmul_(w.mT, u - e @ state)
    return (form.q[:, 0] @ state_BHKV).unsqueeze(1)
