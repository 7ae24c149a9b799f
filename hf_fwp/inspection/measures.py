"""What the fast weights of one layer hold, measured token by token, and which tokens a read draws on.

    norm         ‖S_t‖_F                       change   ‖S_t - S_{t-1}‖_F
    remains      ⟨S_t, S_{t-1}⟩ / ‖S_{t-1}‖²   what is left of the state before, along itself
    rank         exp(-Σ p ln p), p the singular values of S_t over their sum: its effective rank (Roy & Vetterli 2007)

Effective attention: a rule that is linear in its values reads o_t = Σ_i a_ti v_i, with weights a_ti that may be
negative (the dual form, Irie, Csordás & Schmidhuber 2022, arXiv 2202.05798). They are found by running the rule on unit
vectors in the place of the values, and checked: Σ_i a_ti v_i must give back o_t. For another rule a_ti is the share of
token i in the read to first order: v_i · ∂‖o_t‖ / ∂v_i, or the sum of such terms over all that a token brings where it
brings no value. (Gates for each channel of a value leave these shares exact: they add up to ‖o_t‖.)

Shapes: T tokens, S states, R reads, K x V one state; P the tokens at which singular values are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .recording import Recording, States

SINGULAR_VALUES = 16  # of each state, the largest
POSITIONS = 32  # tokens at which they are taken
LINEAR = 1e-3  # relative error of Σ_i a_ti v_i up to which a rule counts as linear in its values


@dataclass(frozen=True)
class StateView:
    """One fast weight matrix per state, over time."""

    norm_TS: Tensor
    change_TS: Tensor
    remains_TS: Tensor
    positions: list[int]
    rank_PS: Tensor
    singular_PSN: Tensor


@dataclass(frozen=True)
class LayerView:
    """What one layer's fast weights did with a text."""

    rule: str
    states: dict[str, StateView]
    """By the name of the state; vectors that a rule carries are left out."""
    beta_TS: Tensor | None
    """Write strength, the mean over the writes of a token."""
    decay_TS: Tensor | None
    """exp(g), the mean over channels."""
    read_TR: Tensor
    """‖o_t‖."""
    attention_RTT: Tensor
    """a_ti: row t, column i; zero above the diagonal."""
    exact: bool
    """Whether a_ti are the weights of the dual form; otherwise first-order shares."""
    recalled_TSV: Tensor | None
    """How the write of token t changed what its own key recalls: (S_t - S_{t-1})ᵀ k_t / ‖k_t‖."""


@torch.no_grad()
def measure(recorded: Recording) -> LayerView:
    """Run the layer's rule again, token by token, and look at its states."""
    over_time = states_over_time(recorded)
    weights = value_weights(recorded)
    beta, g = (recorded.tokens.get(name) for name in ("beta", "g"))
    return LayerView(
        rule=recorded.rule.name,
        states={name: view_state(states) for name, states in over_time.items()},
        beta_TS=None if beta is None else _per_state(beta[0]),
        decay_TS=None if g is None else _per_state(g[0].exp()),
        read_TR=recorded.out_TRV.norm(dim=-1),
        attention_RTT=first_order_shares(recorded) if weights is None else weights,
        exact=weights is not None,
        recalled_TSV=recalled(recorded, over_time),
    )


def _per_state(rates: Tensor) -> Tensor:
    """[T, S] of [T, S] or [T, S, ...]."""
    return rates if rates.ndim == 2 else rates.flatten(2).mean(-1)


def states_over_time(recorded: Recording) -> States:
    """Every matrix that the rule carries, before the first token and after each: {name: [T + 1, S, K, V]}."""
    length = recorded.out_TRV.shape[0]
    states: States | None = None
    found: dict[str, list[Tensor]] = {}
    for t in range(length):
        _, states = recorded.run({name: x[:, t : t + 1] for name, x in recorded.tokens.items()}, states)
        for name, state in states.items():
            for part, matrix in _matrices(name, state[0]):
                found.setdefault(part, []).append(matrix.clone())
    return {name: torch.stack([torch.zeros_like(after[0]), *after]) for name, after in found.items()}


def _matrices(name: str, state: Tensor) -> list[tuple[str, Tensor]]:
    """The matrices [S, K, V] of a state: none of a vector, several where each state of the layer is a stack of them."""
    if state.ndim == 4:
        parts = state.unbind(1)
        return [(f"{name} {n + 1}" if len(parts) > 1 else name, part) for n, part in enumerate(parts)]
    return [(name, state)] if state.ndim == 3 else []


def view_state(states: Tensor) -> StateView:
    """Norms, changes and singular values of [T + 1, S, K, V]."""
    before, after = states[:-1].flatten(2), states[1:].flatten(2)
    along = (before * after).sum(-1) / before.square().sum(-1)
    positions = sorted({round(p) for p in torch.linspace(0, len(after) - 1, POSITIONS).tolist()})
    singular = torch.linalg.svdvals(states[1:][positions])
    shares = singular / singular.sum(-1, keepdim=True).clamp_min(torch.finfo(singular.dtype).tiny)
    return StateView(
        norm_TS=after.norm(dim=-1),
        change_TS=(after - before).norm(dim=-1),
        remains_TS=torch.where(before.any(-1), along, 1.0),
        positions=positions,
        rank_PS=torch.special.entr(shares).sum(-1).exp(),
        singular_PSN=singular[..., :SINGULAR_VALUES],
    )


def value_weights(recorded: Recording) -> Tensor | None:
    """a_ti [R, T, T] of a rule that is linear in its values; None for another."""
    values = recorded.tokens.get("v")
    if values is None or values.shape[-1] != recorded.out_TRV.shape[-1]:
        return None
    size = values.shape[-1]
    by_write = values if values.ndim == 5 else values.unsqueeze(3)  # [1, T, S, writes, V]
    _, length, states, writes, _ = by_write.shape
    columns = []
    for first in range(0, length * writes, size):
        units = torch.zeros_like(by_write)
        written = torch.arange(first, min(first + size, length * writes))
        units[0, written // writes, :, written % writes, written - first] = 1
        out, _ = recorded.run({**recorded.tokens, "v": units.view(values.shape)})
        columns.append(out[0, ..., : len(written)])
    weights_RTN = torch.cat(columns, dim=-1).transpose(0, 1)
    values_SNV = by_write[0].transpose(0, 1).flatten(1, 2)
    reads = weights_RTN @ values_SNV.repeat_interleave(len(weights_RTN) // states, dim=0)
    expected = recorded.out_TRV.transpose(0, 1)
    if not (reads - expected).norm() <= LINEAR * expected.norm():
        return None
    return weights_RTN.unflatten(2, (length, writes)).sum(3)


def first_order_shares(recorded: Recording) -> Tensor:
    """The share of token i in read t, [R, T, T]. Every read is made in a row of its own, so that one backward of the
    batch answers for all of them."""
    length, reads, _ = recorded.out_TRV.shape
    tokens = {name: x.repeat(length, *[1] * (x.ndim - 1)) for name, x in recorded.tokens.items()}
    brought = [tokens["v"]] if "v" in tokens else list(tokens.values())
    leaves = [x.requires_grad_() for x in brought if x.is_floating_point()]
    with torch.enable_grad():
        out, _ = recorded.run(tokens)
        each = torch.arange(length)
        norms = out[each, each].norm(dim=-1).sum(0)  # [R]
        shares = []
        for read in range(reads):
            grads = torch.autograd.grad(norms[read], leaves, retain_graph=True, allow_unused=True)
            parts = [(x * g).flatten(2).sum(-1) for x, g in zip(leaves, grads, strict=True) if g is not None]
            shares.append(torch.stack(parts).sum(0).detach())
    return torch.stack(shares).tril()


def recalled(recorded: Recording, over_time: States) -> Tensor | None:
    """(S_t - S_{t-1})ᵀ k_t / ‖k_t‖, [T, S, V]; of several writes the last one's key. None without keys of that size."""
    keys, states = recorded.tokens.get("k"), over_time.get("state")
    if keys is None or states is None:
        return None
    keys_TSK = (keys if keys.ndim == 4 else keys[:, :, :, -1])[0]
    if keys_TSK.shape[-1] != states.shape[2] or states.shape[3] != recorded.out_TRV.shape[-1]:
        return None
    keys_TSK = keys_TSK.repeat_interleave(states.shape[1] // keys_TSK.shape[1], dim=1)
    units = keys_TSK / keys_TSK.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return torch.einsum("tskv,tsk->tsv", states[1:] - states[:-1], units)
