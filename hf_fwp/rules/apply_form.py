"""How a rule that says its Form is run: checks, groups of heads, padding, packing, and the choice of the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import BACKENDS, Rule, States, keep_valid, recurrence
from .checks import check_arguments, scale_of, sequence_bounds
from .gating import Gate, tensors_of, value_of
from .general import Form, run_decode, run_form, run_kernels, run_token
from .linear_class import (
    LinearClassCall,
    choose_backend,
    computing_dtype,
    decodes,
    l2_normalize,
    refuse_tangents,
    split_queries,
)

MakeForm = Callable[..., Form]
Before = Callable[..., tuple[dict[str, Tensor], States]]


def apply_form(
    rule: Rule,
    make_form: MakeForm | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Gate | None],
    *,
    first: Before | None = None,
    renames: bool = False,
    word: torch.dtype | None = None,
    states: States | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    qk_l2norm: bool = False,
    in_place: bool = False,
    ran: list[str] | None = None,
) -> tuple[Tensor, States]:
    """Run a rule over [B, T, heads, size]. `make_form(q, k, v, inputs..., **options)` says what its tokens do;
    without it only the recurrence can be run. What the keys alone decide is found before, by `first(tokens, states)`.
    A form that `renames` its tensors and computes nothing leaves everything to the kernels, gates that are not computed
    yet (gating.py) too. `word` is the type of their products, that of q, k and v when left out."""
    chosen = rule.resolve_options(options)
    states = states or {}
    given = check_inputs(rule, chosen, {name: next(iter(tensors_of(x)), None) for name, x in inputs.items()}, k, v)
    gates = {name: inputs[name] for name in given}
    one_k, one_v = (x.select(3, 0) if rule.writes and x.ndim == 5 else x for x in (k, v))
    plain = {name: x for name, x in states.items() if name not in rule.shapes}
    check_arguments(q, one_k, one_v, beta=None, g=None, states=plain, mask=mask, cu_seqlens=cu_seqlens)
    out_dtype = v.dtype
    word = word or (q.dtype if q.dtype == k.dtype == v.dtype else torch.float32)
    q, k, v = (x.to(torch.promote_types(x.dtype, word)) for x in (q, k, v))
    tensors = (q, k, v, *(x for gate in gates.values() for x in tensors_of(gate)), *states.values())
    backend = pick_backend(rule, backend, cu_seqlens, *tensors, kernels=make_form is not None)
    if ran is not None:
        ran.append(backend)
    factor = scale_of(scale, k.shape[-1])
    if backend in ("torch", "triton"):
        refuse_tangents(*tensors)
    in_place = in_place and backend == "step" and not torch.is_grad_enabled()
    kernel = backend == "triton" or (backend == "step" and decodes(*tensors))
    computed = renames and backend == "triton"  # by the kernels
    given: dict[str, Any] = gates if computed else {name: value_of(x) for name, x in gates.items()}
    if renames and kernel:
        assert make_form is not None
        form = make_form(q=q, k=k, v=v, **given, **chosen)
        call: dict[str, Any] = {"mask": mask, "scale": factor, "l2norm": qk_l2norm}
        if backend == "step":
            out, state = run_decode(form, states.get("state"), in_place=in_place, **call)
        else:
            out, state = run_kernels(form, states.get("state"), word, cu_seqlens=cu_seqlens, **call)
        return out.to(out_dtype), {"state": state}
    tokens = of_states(rule, {"q": q, "k": k, "v": v, **given}, mask, qk_l2norm)
    tokens["q"] = tokens["q"] * factor
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    before = complete_states(rule, states, count, tokens)
    with torch.autocast(v.device.type, enabled=False):
        if backend == "reference":
            out, after = each_sequence(partial(recurrence, rule.step, **chosen), tokens, before, cu_seqlens, mask)
        else:
            assert make_form is not None
            if first is not None:
                tokens, before = first(tokens, before, cu_seqlens=cu_seqlens, backend=backend)
            start = before["state"].clone() if backend == "step" and not in_place else before["state"]
            out, state = run_tokens(make_form(**tokens, **chosen), start, backend, word, cu_seqlens, kernel=kernel)
            after = {**before, "state": state}
    if in_place:
        changed = {name: x for name, x in after.items() if x is not states.get(name)}
        after |= {name: states[name].copy_(x) for name, x in changed.items() if name in states}
    out = out.flatten(2, 3).to(out_dtype)
    return out if mask is None else keep_valid(out, mask), after


def run_tokens(
    form: Form, state: Tensor, backend: str, word: torch.dtype, cu_seqlens: Tensor | None, *, kernel: bool
) -> tuple[Tensor, Tensor]:
    """Reads [B, T, HV, R, V] and the state after the last token; "step" changes the given one."""
    if backend == "torch":
        return run_form(form, state, cu_seqlens)
    if backend == "step":
        return run_token(form, state, kernel=kernel), state
    out, state = run_kernels(form, state, word, cu_seqlens=cu_seqlens)
    return out.unflatten(2, form.q.shape[2:4]), state


def complete_states(rule: Rule, given: States, count: int, tokens: dict[str, Tensor]) -> States:
    """The rule's states, zeros where none was given; `rule.shapes` also says the shape of those beside S."""
    key_size, like = tokens["k"].shape[-1], tokens["v"]
    sizes = {"HV": like.shape[2], "K": key_size, "V": like.shape[-1]}
    found = {}
    for name in rule.states:
        shape = (count, *(sizes[letter] for letter in rule.shapes.get(name, ("HV", "K", "V"))))
        state = given.get(name)
        if state is not None and (tuple(state.shape) != shape or state.dtype != like.dtype):
            raise ValueError(
                f"the initial {name} of {rule.name} has shape {list(state.shape)} and dtype {state.dtype}; "
                f"these inputs need {list(shape)} in {like.dtype}"
            )
        found[name] = like.new_zeros(shape) if state is None else state
    return found


def each_sequence(
    run: Callable[..., tuple[Tensor, States]],
    tokens: dict[str, Tensor],
    states: States,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, States]:
    """`run(tokens, states, mask=)` over the batch, or over every packed sequence from its own states."""
    if cu_seqlens is None:
        return run(tokens, states, mask=mask)
    outs, ends = [], []
    for n, (start, end) in enumerate(sequence_bounds(cu_seqlens, tokens["q"].shape[1])):
        after = {name: x[n : n + 1] for name, x in states.items()}
        if end > start:
            cut = None if mask is None else mask[:, start:end]
            out, after = run({name: x[:, start:end] for name, x in tokens.items()}, after, mask=cut)
            outs.append(out)
        ends.append(after)
    return torch.cat(outs, dim=1), {name: torch.cat([after[name] for after in ends]) for name in states}


def pick_backend(rule: Rule, backend: str | None, cu_seqlens: Tensor | None, *tensors: Tensor, kernels: bool) -> str:
    """The backend asked for, or the fastest that fits; without `kernels` that is never Triton."""
    if backend == "triton" and not kernels:
        raise ValueError(
            f"backend 'triton' has no kernel for the rule {rule.name}; the backends are {', '.join(BACKENDS)}: "
            "leave it out, or use 'torch', which runs on every device"
        )
    call = LinearClassCall(rule.step, erase=True, cu_seqlens=cu_seqlens, backend=backend)
    return choose_backend(call, *tensors)


def check_inputs(
    rule: Rule, options: Mapping[str, Any], inputs: Mapping[str, Tensor | None], k: Tensor, v: Tensor
) -> dict[str, Tensor]:
    """The inputs that the rule takes with these options; one missing, unasked for or of another shape is refused."""
    wanted = ("q", "k", "v", *rule.inputs_with(options))
    sizes = {"H": k.shape[2], "HV": v.shape[2], "K": k.shape[-1], "V": v.shape[-1], **options}
    found = {}
    for name, x in inputs.items():
        letters = ", ".join(("B", "T", *rule.shape(name)))
        if (x is None) == (name in wanted):
            said = "was not given" if x is None else f"is not used with {dict(options)}; leave it out"
            raise ValueError(f"{rule.name}: {name} [{letters}] {said}; it needs {', '.join(wanted)}")
        if x is None:
            continue
        shape = [*v.shape[:2], *(sizes[letter] for letter in rule.shape(name))]
        if list(x.shape) != shape or not x.is_floating_point():
            raise ValueError(
                f"{rule.name}: {name} has shape {list(x.shape)} and dtype {x.dtype}; "
                f"it must be [{letters}] = {shape} of floating point"
            )
        found[name] = x
    return found


def of_states(rule: Rule, given: Mapping[str, Tensor], mask: Tensor | None, l2norm: bool) -> dict[str, Tensor]:
    """In the computing dtype, zero where the mask is, one per state: q [B,T,HV,R,K], the others [B,T,HV,...]."""
    compute = computing_dtype(given["q"], given["k"], given["v"])
    tokens = {name: x.to(compute) for name, x in given.items()}
    if mask is not None:
        tokens = {name: keep_valid(x, mask) for name, x in tokens.items()}
    if l2norm:
        tokens |= {name: l2_normalize(tokens[name]) for name in ("q", "k")}
    value_heads = given["v"].shape[2]
    tokens["q"] = split_queries(tokens["q"], value_heads)
    group = value_heads // given["k"].shape[2]
    for name in _of_key_heads(rule, given) if group > 1 else ():
        tokens[name] = tokens[name].repeat_interleave(group, dim=2)
    return tokens


def _of_key_heads(rule: Rule, names: Iterable[str]) -> list[str]:
    return [name for name in names if rule.shape(name)[0] == "H"]
