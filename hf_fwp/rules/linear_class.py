"""The rules that are linear in their state, with coefficients that depend on the inputs only.

    S̃_t = exp(g_t) S_{t-1};   r_t = β_t (v_t - S̃_tᵀ e_t);   S_t = S̃_t + k_t ⊗ r_t;   o_t = scale · S_tᵀ q_t

with e = k (delta rules) or e = 0 (sum rule), β = 1 and g = 0 where a rule has none. One implementation serves all of
them: the checks of the arguments, the choice of a backend, and four backends:

    reference   the recurrence over the rule's own step
    torch       chunked, with a hand-written backward (chunked.py)
    triton      the same on a GPU (kernels/linear_class.py)
    step        one token, as generate() needs it, optionally updating the given state in place
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .base import BACKENDS, States, keep_valid, recurrence
from .blocks import L2NORM_EPS
from .checks import check_arguments, scale_of, sequence_bounds
from .chunked_op import chunked
from .gating import Decay, Rate, tensors_of, value_of
from .triton_fit import DEVICES, HAS_TRITON, say_once, why_not_triton


@dataclass(frozen=True)
class LinearClassCall:
    """What stays the same when one rule runs the machinery several times."""

    step: Callable[..., tuple[States, Tensor]]
    erase: bool
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    backend: str | None = None
    qk_l2norm: bool = False
    in_place: bool = False
    ran: list[str] | None = None


def apply_linear_class(
    call: LinearClassCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | Rate | None = None,
    g: Tensor | Decay | None = None,
    states: States | None = None,
    scale: float | None = None,
    **constants: Any,
) -> tuple[Tensor, States]:
    """Check the arguments, choose the backend and run it. Gates that are not computed yet are left to the kernels."""
    states = states or {}
    gates = {"beta": tensors_of(beta), "g": tensors_of(g)}
    named = {name: x[0] if x else None for name, x in gates.items()}
    check_arguments(q, k, v, **named, states=states, mask=call.mask, cu_seqlens=call.cu_seqlens)
    backend = choose_backend(call, q, k, v, *gates["beta"], *gates["g"], *states.values())
    if call.ran is not None:
        call.ran.append(backend)
    factor = scale_of(scale, k.shape[-1])
    if backend in ("torch", "triton"):
        refuse_tangents(q, k, v, *gates["beta"], *gates["g"], *states.values())
    if backend == "triton":
        out, state = _triton(call, q, k, v, beta=beta, g=g, state=states.get("state"), scale=factor)
        return out, {"state": state}
    rates = {"beta": value_of(beta), "g": value_of(g)}
    if backend == "reference":
        with torch.autocast(v.device.type, enabled=False):
            return _reference(call, q, k, v, **rates, states=states, scale=factor, **constants)
    run = _decode if backend == "step" else _chunked
    out, state = run(call, q, k, v, **rates, state=states.get("state"), scale=factor)
    return out, {"state": state}


def choose_backend(
    call: LinearClassCall, q: Tensor, *others: Tensor | None, why_not: Callable[..., str | None] = why_not_triton
) -> str:
    """The backend asked for, or the fastest that fits these tensors; `why_not` says why kernels cannot serve them."""
    single = q.shape[1] == 1 and call.cu_seqlens is None
    if call.backend is None:
        if single and not needs_gradient(q, *others):
            return "step"
        reason = why_not(q, *others)
        if reason and q.device.type in DEVICES:
            say_once(f"{reason}: this call runs in PyTorch (backend 'torch') instead of a Triton kernel")
        return "torch" if reason else "triton"
    if call.backend not in BACKENDS:
        raise ValueError(f"unknown backend {call.backend!r}; choose from {', '.join(BACKENDS)}, or None")
    reason = why_not(q, *others, asked=True) if call.backend == "triton" else None
    if reason:
        raise ValueError(f"backend 'triton' cannot run this: {reason}; use 'torch', or leave the backend out")
    if call.backend == "step" and not single:
        raise ValueError(
            f"backend 'step' takes one token per row, but T = {q.shape[1]}"
            + (" with cu_seqlens" if call.cu_seqlens is not None else "")
            + "; use 'torch', or leave the backend out"
        )
    return call.backend


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode derivatives would be lost in an operator, without a word."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(
            "forward-mode derivatives (jvp, jacfwd) do not pass through the chunked forms; use backend='reference'"
        )


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def has_decode_kernel(device_type: str) -> bool:
    """Whether Triton can run on this kind of device."""
    return HAS_TRITON and device_type in DEVICES


def decodes(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel can take these tensors' token: it computes in float32, and no gradients."""
    tensors = (first, *others)
    return (
        has_decode_kernel(first.device.type)
        and computing_dtype(*tensors) == torch.float32
        and not needs_gradient(*tensors)
    )


def computing_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32 for every input but float64: the state drifts in bf16."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def empty_state(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Zeros [N, HV, K, V]."""
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(count, v.shape[2], k.shape[3], v.shape[3], dtype=computing_dtype(q, k, v), device=v.device)


def l2_normalize(x: Tensor) -> Tensor:
    """x / √(Σ x² + ε) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS)


def split_queries(q_BTHK: Tensor, value_heads: int) -> Tensor:
    """[B, T, HQ, K] as [B, T, HV, R, K]: the R queries that read each state. With HQ = H, a group shares its query."""
    heads = q_BTHK.shape[2]
    if heads < value_heads:
        return q_BTHK.repeat_interleave(value_heads // heads, dim=2).unsqueeze(3)
    return q_BTHK.unflatten(2, (value_heads, heads // value_heads))


def _reference(
    call: LinearClassCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None,
    g: Tensor | None,
    states: States,
    scale: float,
    **constants: Any,
) -> tuple[Tensor, States]:
    compute = computing_dtype(q, k, v)
    group = v.shape[2] // k.shape[2]
    given = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    inputs = {name: x.to(compute) for name, x in given.items() if x is not None}
    if call.qk_l2norm:
        inputs |= {"q": l2_normalize(inputs["q"]), "k": l2_normalize(inputs["k"])}
    inputs |= {"q": split_queries(inputs["q"], v.shape[2]), "k": inputs["k"].repeat_interleave(group, dim=2)}
    states = {"state": empty_state(q, k, v, call.cu_seqlens)} | states
    if constants.get("normalize"):
        states = {"norm_state": torch.zeros_like(states["state"][:, ::group, :, 0])} | states
    states = {n: s if s.shape[1] == v.shape[2] else s.repeat_interleave(group, dim=1) for n, s in states.items()}

    def run(rows: slice, span: slice, sequences: slice) -> tuple[Tensor, States]:
        return recurrence(
            call.step,
            {name: x[rows, span] for name, x in inputs.items()},
            {name: s[sequences] for name, s in states.items()},
            mask=None if call.mask is None else call.mask[rows, span],
            scale=scale,
            **constants,
        )

    everything = slice(None)
    if call.cu_seqlens is None:
        out, states = run(everything, everything, everything)
    else:
        bounds = sequence_bounds(call.cu_seqlens, q.shape[1])
        parts = [run(everything, slice(a, b), slice(n, n + 1)) for n, (a, b) in enumerate(bounds)]
        out = torch.cat([part for part, _ in parts], dim=1)
        states = {name: torch.cat([s[name] for _, s in parts]) for name in states}
    if "norm_state" in states:
        states["norm_state"] = states["norm_state"][:, ::group]
    return out.flatten(2, 3).to(v.dtype), states


def _chunked(
    call: LinearClassCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    mask = call.mask
    if mask is not None:
        q, k, v = (keep_valid(x, mask) for x in (q, k, v))
        beta, g = (x if x is None else keep_valid(x, mask) for x in (beta, g))
    out, state = chunked(
        q,
        k,
        v,
        beta=beta,
        g=g,
        state=state,
        cu_seqlens=call.cu_seqlens,
        scale=float(scale),
        erase=call.erase,
        l2norm=call.qk_l2norm,
    )
    # A masked query reads 0 already; the second `where` keeps whatever gradient arrives there out of the backward.
    return out if mask is None else keep_valid(out, mask), state


def _triton(
    call: LinearClassCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | Rate | None,
    g: Tensor | Decay | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from ..kernels.linear_class import chunked as chunked_by_kernels

    return chunked_by_kernels(
        q,
        k,
        v,
        beta=beta,
        g=g,
        state=state,
        mask=call.mask,
        cu_seqlens=call.cu_seqlens,
        scale=float(scale),
        erase=call.erase,
        l2norm=call.qk_l2norm,
    )


def _decode(
    call: LinearClassCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token per row, [B, 1, heads, size]. Few calls: generate() waits for every one of them."""
    compute = computing_dtype(q, k, v)
    if decodes(v, q, k, beta, g, state):
        from ..kernels.decode import decode_step

        settings = {"scale": float(scale), "erase": call.erase, "l2norm": call.qk_l2norm}
        in_place = call.in_place and not torch.is_grad_enabled()
        return decode_step(q, k, v, beta=beta, g=g, state=state, mask=call.mask, in_place=in_place, **settings)
    if call.mask is not None:
        q, k, v = (keep_valid(x, call.mask) for x in (q, k, v))
        beta, g = (x if x is None else keep_valid(x, call.mask) for x in (beta, g))
    q_BHK, k_BHK = q[:, 0].to(compute), k[:, 0].to(compute)
    if call.qk_l2norm:
        q_BHK, k_BHK = l2_normalize(q_BHK), l2_normalize(k_BHK)
    value_heads = v.shape[2]
    if k_BHK.shape[1] != value_heads:
        k_BHK = k_BHK.repeat_interleave(value_heads // k_BHK.shape[1], dim=1)
    q_BHRK = split_queries(q_BHK[:, None], value_heads)[:, 0]
    write_BH1V = v.transpose(1, 2).to(compute)

    if state is None:
        state = empty_state(q, k, v, None)
    elif not (call.in_place and not torch.is_grad_enabled()):
        state = state.clone()
    with torch.autocast(v.device.type, enabled=False):
        if g is not None:
            state.mul_(g.to(compute).exp().transpose(1, 2).unsqueeze(-1))
        if call.erase:
            write_BH1V = write_BH1V - torch.matmul(k_BHK.unsqueeze(2), state)
        if beta is not None:
            write_BH1V = write_BH1V * beta.to(compute).transpose(1, 2).unsqueeze(-1)
        state.addcmul_(k_BHK.unsqueeze(-1), write_BH1V)
        out_BHRV = torch.matmul(q_BHRK * scale, state)
    return out_BHRV.flatten(1, 2).unsqueeze(1).to(v.dtype), state
