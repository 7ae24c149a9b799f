"""The general linear rule, parallel over the tokens of a chunk: its own write key, erase vector and channel decay.

    S̃_t = Diag(exp(g_t)) S_{t-1};   r_t = u_t - S̃_tᵀ e_t;   S_t = S̃_t + w_t ⊗ r_t;   o_t = S_tᵀ q_t

Inside a chunk of C tokens that starts from the state S0, with G the inclusive cumulative sum of g:

    A_ij = Σ_d e_i w_j exp(G_i - G_j), i > j      P_ij = Σ_d q_i w_j exp(G_i - G_j), i ≥ j
    R  = (I + A)⁻¹ (U - (E ⊙ exp(G)) S0)          O = (Q ⊙ exp(G)) S0 + P R
    S1 = Diag(exp(G_C)) S0 + (W ⊙ exp(G_C - G))ᵀ R

A transposed form (Oja) keeps M = Sᵀ and reads the other side:

    o_i = exp(G_i) ⊙ (M0 q_i) + Σ_{j≤i} (q_i · r_j) exp(G_i - G_j) ⊙ w_j

Only R and S1 wait for the chunk before (general_chunks.py). Where w = k, e = βk, u = βv and the decay is one number per
head, chunked.py does the same with less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .general_op import chunked_form


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

    def gated(self) -> tuple[Tensor, Tensor]:
        """e and u as their channels are gated."""
        e = self.e if self.erase is None else self.erase * self.e
        return e, self.u if self.write is None else self.write * self.u

    def rated(self) -> tuple[Tensor, Tensor]:
        """e and u, gated, at their rate."""
        e, u = self.gated()
        if self.rate is None:
            return e, u
        rate = self.rate.unsqueeze(-1)
        return rate * e, rate * u


def run_form(form: Form, state_BHKV: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Reads [B, T, HV, R, V] and the state after the last token, in the dtype of the state, by PyTorch."""
    state = state_BHKV.mT if form.transposed else state_BHKV
    e, u = form.rated()
    tensors = (form.q.flatten(2, 3), form.w, e, u, form.g)
    out, state = chunked_form(*tensors, state, cu_seqlens, transposed=form.transposed)
    return out.unflatten(2, form.q.shape[2:4]), state.mT if form.transposed else state


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


def run_token(form: Form, state_BHKV: Tensor, *, kernel: bool) -> Tensor:
    """One token: reads [B, 1, HV, R, V]; the state is changed in place, by a kernel where there is one."""
    if kernel and not form.transposed:
        return run_decode(form, state_BHKV, in_place=True)[0].unflatten(2, form.q.shape[2:4])
    state = state_BHKV.mT if form.transposed else state_BHKV
    w, e, u = (x[:, 0].unsqueeze(2) for x in (form.w, *form.gated()))
    if form.g is not None:
        state.mul_(form.g[:, 0].exp().unsqueeze(-1))
    written = u - e @ state
    if form.rate is not None:
        written.mul_(form.rate[:, 0, :, None, None])
    state.addcmul_(w.mT, written)
    return (form.q[:, 0] @ state_BHKV).unsqueeze(1)
