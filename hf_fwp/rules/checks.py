"""What the operators accept, said in words when something else was given."""

from itertools import pairwise

import torch
from torch import Tensor

from .base import Own

SHAPES = "k [B,T,H,K]; v [B,T,HV,V] with HV a multiple of H; q [B,T,HQ,K] with HQ = H or a multiple of HV"
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None,
    g: Tensor | None,
    states: dict[str, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError for what no backend can run."""
    named = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    for name, x in named.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; give a tensor, for instance torch.tensor({name})")
        if x is not None and x.dtype not in FLOATS:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
            raise ValueError(f"{name} has dtype {x.dtype}; allowed are {allowed}: convert it with .to(torch.float32)")
    _check_heads(q, k, v)
    per_head = (*v.shape[:3],)
    for name in ("beta", "g"):
        x = named[name]
        if x is not None and tuple(x.shape) != per_head:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [B, T, value heads] = {list(per_head)}")
    if mask is not None and tuple(mask.shape) != per_head[:2]:
        raise ValueError(
            f"mask has shape {list(mask.shape)}; it must be [B, T] = {list(per_head[:2])}: 1 for tokens, 0 for padding"
        )
    _check_mask(mask)
    _check_packing(q, cu_seqlens)
    _check_states(q, k, v, states, cu_seqlens)


def scale_of(scale: float | None, key_size: int) -> float:
    """K ** -0.5 where none is given. Raises ValueError for 0 and for a tensor."""
    if scale is None:
        return key_size**-0.5
    if isinstance(scale, Tensor) or scale == 0:
        raise ValueError(f"scale is {scale!r}; it must be a number other than 0 (to learn one, multiply the outputs)")
    return float(scale)


def check_length(length: int) -> None:
    """Raise ValueError for a sequence without a token."""
    if length == 0:
        raise ValueError("the sequence is empty (T = 0); pass at least one token")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} dimensions, shape {list(x.shape)}; expected {SHAPES}")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(
            f"[B, T] differ: q {list(q.shape[:2])}, k {list(k.shape[:2])}, v {list(v.shape[:2])}; expected {SHAPES}"
        )
    check_length(q.shape[1])
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has size {q.shape[3]} per head and k {k.shape[3]}; both must have the key size K")
    query_heads, heads, value_heads = q.shape[2], k.shape[2], v.shape[2]
    if value_heads % heads:
        raise ValueError(
            f"v has {value_heads} heads and k {heads}; the number of value heads must be a multiple of the key heads"
        )
    if query_heads != heads and query_heads % value_heads:
        raise ValueError(
            f"q has {query_heads} heads with {heads} key heads and {value_heads} value heads; "
            f"allowed are {heads} (as many as k) or a multiple of {value_heads} (several queries read one state)"
        )


def _check_mask(mask: Tensor | None) -> None:
    """An additive mask has 0 for tokens. On an accelerator the question would wait for the device."""
    if mask is None or not mask.is_floating_point() or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((mask < 0).any()):
        raise ValueError(
            f"mask is of {mask.dtype} with numbers below 0, as one added to scores; it must be 1 for tokens and "
            "0 for padding: give mask >= 0"
        )


def _check_packing(q: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences in one row, but B = {q.shape[0]}; flatten q, k, v to B = 1")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "it must be a vector of int32 or int64 with the boundaries of the sequences: [0, first length, ..., T]"
        )


def _check_states(q: Tensor, k: Tensor, v: Tensor, states: dict[str, Tensor], cu_seqlens: Tensor | None) -> None:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    shapes = {"state": (count, v.shape[2], k.shape[3], v.shape[3]), "norm_state": (count, k.shape[2], k.shape[3])}
    for name, state in states.items():
        if name not in shapes:
            raise ValueError(f"unknown state {name!r}; the states are {', '.join(shapes)}")
        if tuple(state.shape) != shapes[name]:
            raise ValueError(
                f"the initial {name} has shape {list(state.shape)}; these inputs need {list(shapes[name])}: "
                "[sequences, value heads, K, V] for state, [sequences, key heads, K] for norm_state"
            )
        if state.dtype != dtype:
            raise ValueError(f"the initial {name} has dtype {state.dtype}; it must be {dtype}: use .to()")


def sequence_bounds(cu_seqlens: Tensor, length: int) -> list[tuple[int, int]]:
    """(start, end) of every packed sequence. Reads the values, so it waits for the device."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens is {ends}; it must start with 0, never decrease, and end with T = {length}")
    return list(pairwise(ends))


def check_own_arguments(
    rule: str,
    common: tuple[str, ...],
    own: Own,
    *,
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor],
    states: dict[str, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError where the arguments of a rule with inputs, weights and states of its own do not fit."""
    expected = (*common, *own.projections, *(("x",) if own.hidden else ()))
    widths = {**own.projections, **own.optional}
    _check_names(f"argument of {rule}", {n: x for n, x in inputs.items() if n not in own.optional}, expected)
    _check_names(f"weight of {rule}", weights, tuple(own.weights))
    first = next(iter(inputs.values()))
    batch, length, heads = first.shape[:3]
    check_length(length)
    for name, x in inputs.items():
        width = (widths[name],) if name in widths else tuple(x.shape[3:])
        _check_shape(name, x, (batch, length, heads, *width))
    for name, x in weights.items():
        _check_shape(name, x, (heads, *own.weights[name].shape))
    if mask is not None:
        _check_shape("mask", mask, (batch, length))
    _check_packing(first, cu_seqlens)
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs.values()) else torch.float32
    for name, x in states.items():
        if name not in own.states:
            raise ValueError(f"unknown state {name!r} of {rule}; the states are {', '.join(own.states)}")
        _check_shape(f"the initial {name}", x, (count, heads, *own.states[name]))
        if x.dtype != dtype:
            raise ValueError(f"the initial {name} has dtype {x.dtype}; it must be {dtype}: use .to()")


def _check_names(kind: str, given: dict[str, Tensor], expected: tuple[str, ...]) -> None:
    unknown, missing = sorted(set(given) - set(expected)), [name for name in expected if name not in given]
    if unknown or missing:
        wrong = f"unknown {kind}: {unknown[0]!r}" if unknown else f"missing {kind}: {missing[0]!r}"
        raise ValueError(f"{wrong}; it takes {', '.join(expected) or 'none'}")


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.dtype not in FLOATS and name != "mask":
        raise ValueError(f"{name} has dtype {x.dtype}; it must be a floating-point tensor: use .to(torch.float32)")
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {list(x.shape)}; these inputs need {list(expected)}")
