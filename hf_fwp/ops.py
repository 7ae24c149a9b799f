"""The operators on tensors: linear_attention, delta_rule, delta_product, gated_delta_rule.

    k [B,T,H,K];  v [B,T,HV,V] with HV a multiple of H
    q [B,T,HQ,K] with HQ = H, or HQ = R·HV: then R queries read one state
    beta, g [B,T,HV];  state [N,HV,K,V] in float32 (float64 for float64 inputs)
    out [B,T,HV,V], or [B,T,HQ,V] when several queries read one state

Keywords of all of them:
    scale               multiplies the reads; K ** -0.5 when left out
    initial_state       the state before the first token; never modified
    output_final_state  return the state after the last token, otherwise None
    cu_seqlens          [N + 1] boundaries of N sequences packed in one row (B = 1); every one starts from its own state
    mask                [B,T], 0 = padding: changes no state, reads 0, may hold NaN
    backend             "reference" (the recurrence), "torch" (chunked, any device), "triton" (chunked, GPUs),
                        "step" (one token); None = the fastest that fits. "triton" does not wait for the values of
                        cu_seqlens: they are trusted to rise from 0 to T

The mathematics is in hf_fwp.rules, one file per rule.
"""

from torch import Tensor

from .rules import RULES

NormalizedState = tuple[Tensor, Tensor]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | NormalizedState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """The sum rule S ← exp(g) S + k ⊗ v. With `normalize`, reads are divided by z·q (and `scale` is 1 when left out);
    the state is then a pair (S, z), z [N,H,K]."""
    states = None
    if initial_state is not None:
        if normalize != isinstance(initial_state, tuple):
            expected = "a pair (state, norm_state)" if normalize else "one tensor"
            raise ValueError(
                f"initial_state is {type(initial_state).__name__}; with normalize={normalize} it must be {expected}: "
                "pass on what an earlier call with the same normalize returned"
            )
        pair = initial_state if isinstance(initial_state, tuple) else (initial_state,)
        states = dict(zip(("state", "norm_state"), pair, strict=normalize))
    out, states = RULES["linear_attention"].apply(
        q,
        k,
        v,
        g=g,
        states=states,
        mask=mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
        backend=backend,
        options={"normalize": normalize},
    )
    if not output_final_state:
        return out, None
    return out, (states["state"], states["norm_state"]) if normalize else states["state"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule S ← S + k ⊗ β(v - Sᵀk). Keys are expected at length 1; `use_qk_l2norm_in_kernel` sees to it. With
    β‖k‖² > 2 states grow without bound, and kernels with inputs in 16 bits overflow first."""
    out, states = RULES["delta_net"].apply(
        q,
        k,
        v,
        beta=beta,
        states=None if initial_state is None else {"state": initial_state},
        mask=mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
        backend=backend,
        qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return out, states["state"] if output_final_state else None


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """n = `num_householder` steps of the delta rule per token, after a decay by exp(g) unless g is None.

    k [B,T·n,H,K], v [B,T·n,HV,V], beta [B,T·n,HV] with the steps of a token side by side; q and g have T tokens."""
    if not isinstance(num_householder, int):
        raise ValueError(f"num_householder is {num_householder!r}; it must be a whole number of at least 1")
    if num_householder < 1 or any(x.shape[1] != q.shape[1] * num_householder for x in (k, v, beta)):
        raise ValueError(
            f"k, v and beta have {k.shape[1]}, {v.shape[1]} and {beta.shape[1]} steps; with {q.shape[1]} queries and "
            f"num_householder = {num_householder} (at least 1) they need {q.shape[1] * num_householder}"
        )
    k, v, beta = (x.unflatten(1, (-1, num_householder)).transpose(2, 3) for x in (k, v, beta))
    out, states = RULES["delta_product"].apply(
        q,
        k,
        v,
        beta=beta,
        g=g,
        states=None if initial_state is None else {"state": initial_state},
        mask=mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
        backend=backend,
        qk_l2norm=use_qk_l2norm_in_kernel,
        options={"num_householder": num_householder, "forget_gate": g is not None},
    )
    return out, states["state"] if output_final_state else None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule S ← exp(g) S, then S ← S + k ⊗ β(v - Sᵀk). g ≤ 0 is the logarithm of the decay, one per
    value head, or one per channel [B,T,HV,K]: then row i of S decays by exp(g_i)."""
    out, states = RULES["kimi_delta" if g is not None and g.ndim == 4 else "gated_delta_net"].apply(
        q,
        k,
        v,
        beta=beta,
        g=g,
        states=None if initial_state is None else {"state": initial_state},
        mask=mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
        backend=backend,
        qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return out, states["state"] if output_final_state else None
