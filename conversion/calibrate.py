"""Stage 0, calibrate: per head, the fast weight whose read explains the teacher's attention head best.

For every time scale and head we choose by measurement, never by formula:

    half-life    S forgets half of what it holds in so many tokens,  exp(g) = 2 ** (-1 / half-life)
    beta         write strength
    rotate       whether q and k carry the rotary position embedding
    bias         size of a constant component b u of q and k (u: the direction that q and k use least), so that
                 the state also holds the mean of the values, which L2-normalised q and k cannot ask for

by the residual, on sequences held out of the fit, of a ridge regression per head from its read to the teacher's head.
Candidates are tried in rounds: a round varies some fields of the best setting so far, for all heads at once.

    gate = sigmoid(W x)

of a read is fitted by ridge regression on log-odds: the first time scale's to the attention mass that does not fall
on the first token (the sink, which says "nothing here"), the second's to the mass on the last LOCAL tokens.
The published formulas for decay and beta from mean distance and entropy made things worse here: sinks spoil both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fwp.cache import MixerInputs
from hf_fwp.features import QK_NORMS
from hf_fwp.layer import FastWeightLayer, rotate
from hf_fwp.options import refuse_unknown
from hf_fwp.packing import Window

from .softmax import Softmax

LOCAL = 16  # tokens that count as near
QUERY_BLOCK = 128
FOREVER = 1e6  # tokens; a half-life that forgets nothing

Round = Mapping[str, Sequence[Any]]

# Per time scale: where the search starts, and its rounds. Scale 0 reaches far, later ones are local.
START: tuple[dict[str, Any], ...] = (
    {"half_life": 32.0, "beta": 0.1, "bias": 0.35, "rotate": False},
    {"half_life": 6.0, "beta": 0.2, "bias": 0.0, "rotate": True},
)
ROUNDS: tuple[tuple[Round, ...], ...] = (
    (
        {"half_life": (4.0, 16.0, 64.0, 256.0), "rotate": (False, True)},
        {"bias": (0.15, 0.6)},
        {"beta": (0.03, 0.3)},
    ),
    (
        {"half_life": (2.0, 6.0, 16.0), "rotate": (False, True)},
        {"beta": (0.05, 0.5)},
        {"bias": (0.35,)},
    ),
)


@dataclass(frozen=True)
class Heads:
    """What the teacher's attention does in one layer, per query head.

    q, k [n,T,H,K] plain and rotated, k and v repeated over their groups; out [n,T,H,V] the heads' outputs;
    sink, local, near [n,T,H] the attention mass on the first token, on the last LOCAL ones but the first, and on the
    mixer's window and sinks.
    """

    q: Tensor
    k: Tensor
    q_rotated: Tensor
    k_rotated: Tensor
    v: Tensor
    out: Tensor
    sink: Tensor
    local: Tensor
    near: Tensor


@torch.no_grad()
def attention_heads(
    mixer: FastWeightLayer,
    x_NTD: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    softmax: Softmax,
) -> Heads:
    """The teacher's softmax attention, from the copies of its projections in `mixer`. No T x T map is kept."""
    options = mixer.options
    q, k = (p(x_NTD).unflatten(-1, (-1, options.head_dim)) for p in (mixer.q_proj, mixer.k_proj))
    v = mixer.v_proj(x_NTD).unflatten(-1, (-1, options.value_head_dim))
    if options.head_norm:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    rotary = mixer.standard_rotary(rotary)
    q_rotated, k_rotated = (q, k) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary))
    out, (sink, local, near) = torch.empty_like(v), (torch.empty_like(v[..., 0]) for _ in range(3))
    for rows, mass, back in masses(q_rotated, k_rotated, softmax):
        out[:, rows] = torch.einsum("nhqt,nthv->nqhv", mass, v[:, : rows.stop])
        sink[:, rows] = mass[..., 0].transpose(1, 2)
        counted = (back >= 0) & (back < LOCAL)
        counted[:, 0] = False
        local[:, rows] = (mass * counted).sum(-1).transpose(1, 2)
        counted = back < options.window
        counted[:, : options.sinks] = True
        near[:, rows] = (mass * counted).sum(-1).transpose(1, 2)
    return Heads(q, k, q_rotated, k_rotated, v, out, sink, local, near)


def masses(q: Tensor, k: Tensor, softmax: Softmax) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, mass [n,H,rows,t], back [rows,t]) of QUERY_BLOCK queries at a time, from rotated q and k [n,T,H,K].

    `back` says how many tokens a key stands before its query, negative for later ones.
    """
    positions = torch.arange(q.shape[1], device=q.device)
    for start in range(0, q.shape[1], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        back = positions[rows, None] - positions[None, : rows.stop]
        scores = torch.einsum("nqhk,nthk->nhqt", q[:, rows], k[:, : rows.stop])
        yield rows, softmax.mass(scores, back), back


@torch.no_grad()
def calibrate(
    mixer: FastWeightLayer,
    x_NTD: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    softmax: Softmax,
    heldout: int,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Set decay, write strength, rotation, bias and gate of a mixer that holds the teacher's projections.

    `x_NTD` are inputs of the teacher's attention; the last `heldout` sequences judge, the others fit. `softmax`
    says how the teacher makes attention of q·k. `fixed` fields have this value in all heads and are not searched.
    Returns what was chosen, per time scale and head, with the residual of each.
    """
    if not 0 < heldout < len(x_NTD):
        raise ValueError(f"heldout is {heldout} of {len(x_NTD)} sequences; keep at least one to fit and one to judge")
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)
    gates_MNTH = fit_gates(mixer, x_NTD, heads)
    gates = [None] * mixer.options.time_scales if gates_MNTH is None else list(gates_MNTH)
    found: list[Tensor] = []
    if mixer.window is not None:
        near_NTHV, outside_NTH = fit_window(mixer, x_NTD, heads, softmax)
        found.append(near_NTHV)
        gates = [outside_NTH if gate is None else gate * outside_NTH for gate in gates]
    search = _Search(mixer, heads, heldout, fixed or {})
    chosen: list[dict[str, list[Any]]] = []
    for m, gate in enumerate(gates):
        setting, read, residual = search.best(m, found, gate)
        found.append(read)
        chosen.append({**{name: value.tolist() for name, value in setting.items()}, "residual": residual.tolist()})
        search.write(m, setting)
    if "rotate" in chosen[0]:
        states = [bool(turned) for scale_ in chosen for turned in scale_["rotate"]]
        mixer.options = mixer.options.replace(rope_heads=states)
    return {"time_scales": chosen, "rope_heads": mixer.options.rope_heads}


class _Search:
    """Settings are dicts of tensors [S]: every round tries some values of some fields in all states at once.

    A state belongs to one query head, or is read by all query heads of a group, which then judge it together.
    """

    def __init__(
        self, mixer: FastWeightLayer, heads: Heads, heldout: int, fixed: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self.mixer, self.heads, self.fit = mixer, heads, len(heads.v) - heldout
        self.num_states, self.device = mixer.options.heads_of_states, heads.v.device
        self.queries = heads.v.shape[2] // self.num_states  # of a state
        k, k_rotated, self.v = (each[:, :, :: self.queries] for each in (heads.k, heads.k_rotated, heads.v))
        self.q, self.k = {False: heads.q, True: heads.q_rotated}, {False: k, True: k_rotated}
        self.unused = {rotated: _least_used(self.q[rotated], self.k[rotated]) for rotated in (False, True)}
        self.sizes = tuple(each[False].norm(dim=-1).mean((0, 1))[:, None] for each in (self.q, self.k))
        self.fields, self.fixed = self._fields(), fixed
        refuse_unknown("fixed field", fixed, START[0])

    def _fields(self) -> set[str]:
        options = self.mixer.options
        found = {"half_life"} if "g" in self.mixer.rule.inputs else set()
        found |= {"beta"} if "beta" in self.mixer.rule.inputs and options.beta_bias else set()
        found |= {"bias"} if options.state_bias else set()
        return found | ({"rotate"} if options.rope_heads != "none" else set())

    def best(self, m: int, found: list[Tensor], gate: Tensor | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(setting, read, residual per state) of the best candidate of time scale `m`, given the reads found before."""
        which = min(m, len(START) - 1)
        start = {name: value for name, value in {**START[which], **self.fixed}.items() if name in self.fields}
        best = {name: torch.full((self.num_states,), value, device=self.device) for name, value in start.items()}
        kept_read, kept = None, torch.full((self.num_states,), math.inf, device=self.device)
        for candidate in self._candidates(best, ROUNDS[which]):
            read = self.read(candidate, gate)
            residual = self.residual([*found, read])
            better = residual < kept
            kept = torch.where(better, residual, kept)
            kept_read = read if kept_read is None else torch.where(self.of_queries(better)[:, None], read, kept_read)
            for name, value in candidate.items():
                best[name] = torch.where(better, value, best[name])
        assert kept_read is not None, "there is at least one candidate"
        return best, kept_read, kept

    def _candidates(self, best: dict[str, Tensor], rounds: Sequence[Round]) -> Iterator[dict[str, Tensor]]:
        searched = self.fields - set(self.fixed)
        if not any(name in searched for name in rounds[0]):
            yield dict(best)
        for tried in rounds:
            names = [name for name in tried if name in searched]
            base = dict(best)
            for values in product(*(tried[name] for name in names)) if names else ():
                changes = {n: torch.full_like(base[n], v) for n, v in zip(names, values, strict=True)}
                yield {**base, **changes}

    def of_queries(self, x_S: Tensor) -> Tensor:
        """[H, ...]: for every query head what belongs to the state it reads."""
        return x_S.repeat_interleave(self.queries, 0)

    def features(self, setting: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """q [n,T,H,K] and k [n,T,S,K] as the mixer would make them."""
        turned = self._turned(setting)[:, None]
        q = torch.where(self.of_queries(turned), self.q[True], self.q[False])
        k = torch.where(turned, self.k[True], self.k[False])
        if "bias" in setting:
            q_bias, k_bias = self.biases(setting)
            q, k = q + q_bias, k + k_bias
        norm = QK_NORMS[self.mixer.options.qk_norm]
        q, k = self.mixer.feature_map(q, k)
        return norm(q), norm(k)

    def biases(self, setting: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[H, K] and [S, K]: the constant components of q and k."""
        direction = torch.where(self._turned(setting)[:, None], self.unused[True], self.unused[False])
        size_q, size_k = self.sizes
        towards = setting["bias"][:, None] * direction
        return size_q * self.of_queries(towards), size_k * towards

    def _turned(self, setting: Mapping[str, Tensor]) -> Tensor:
        if "rotate" in setting:
            return setting["rotate"]
        return torch.full((self.num_states,), self.mixer.options.rope_heads == "all", device=self.device)

    def read(self, setting: Mapping[str, Tensor], gate: Tensor | None) -> Tensor:
        q, k = self.features(setting)
        options, shape = self.mixer.options, self.v.shape[:3]
        rates = {}
        if "beta" in self.mixer.rule.inputs:
            rates["beta"] = setting["beta"].expand(shape) if "beta" in setting else torch.full(shape, 0.5)
        if "g" in self.mixer.rule.inputs:
            rates["g"] = (-math.log(2) / setting["half_life"]).expand(shape)
        out, _ = self.mixer.rule.apply(
            q, k, self.v, **rates, scale=options.scale, options=options.rule_options, backend=options.backend
        )
        return out if gate is None else out * gate[..., None]

    def residual(self, reads: list[Tensor]) -> Tensor:
        """[S]: ||W r - y||² / ||y||² on the held-out sequences, W by ridge regression of each head on the others."""
        weight = self.weights([read[: self.fit] for read in reads])
        r_HNK, y_HNV = _per_head([read[self.fit :] for read in reads], self.heads.out[self.fit :])
        missed, energy = (part.square().sum((1, 2)) for part in (r_HNK @ weight - y_HNV, y_HNV))
        return missed.view(-1, self.queries).sum(1) / energy.view(-1, self.queries).sum(1)

    def weights(self, reads: list[Tensor]) -> Tensor:
        """[H, M V + 1, V]: the ridge regression of each head on its reads and 1, over the sequences of `reads`."""
        r_HNK, y_HNV = _per_head(reads, self.heads.out[: len(reads[0])])
        gram = r_HNK.mT @ r_HNK
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal.mul_(1 + 1e-3).add_(1e-6 * diagonal.mean(1, keepdim=True))
        return torch.linalg.solve(gram, r_HNK.mT @ y_HNV)

    def write(self, m: int, setting: Mapping[str, Tensor]) -> None:
        """Put a setting into the mixer's parameters, as constants: their projections of x start at zero."""
        mixer, first = self.mixer, m * self.num_states
        states = slice(first, first + self.num_states)
        write_rates(mixer, states, setting)
        if "bias" in setting:
            reads = slice(first * self.queries, (first + self.num_states) * self.queries)
            mixer.q_bias[reads], mixer.k_bias[states] = self.biases(setting)


def write_rates(mixer: FastWeightLayer, states: slice, setting: Mapping[str, Tensor]) -> None:
    """Put half-lives and write strengths, [states] each, into the mixer's parameters, the same for every token."""
    if "half_life" in setting:
        mixer.a_proj.weight[states] = 0
        mixer.dt_bias[states] = math.log(math.e - 1)  # softplus of it is 1
        mixer.A_log[states] = torch.log(math.log(2) / setting["half_life"]).to(mixer.A_log.dtype)
    if "beta" in setting:
        most = 2.0 if mixer.options.allow_neg_eigval else 1.0
        mixer.b_proj.weight[states] = 0
        mixer.b_proj.bias[states] = torch.logit(setting["beta"] / most)


def _per_head(reads: list[Tensor], out: Tensor) -> tuple[Tensor, Tensor]:
    """Reads with a 1 after them [H, tokens, R], and the teacher's heads [H, tokens, V]."""
    inputs = torch.cat([*reads, torch.ones_like(reads[0][..., :1])], dim=-1)
    r_HNK, y_HNV = (t.permute(2, 0, 1, 3).flatten(1, 2) for t in (inputs, out))
    return r_HNK, y_HNV


def _least_used(q: Tensor, k: Tensor) -> Tensor:
    """[S, K]: per state the unit vector along which L2-normalised q [n,T,H,K] and k [n,T,S,K] have the least energy."""
    parts = [F.normalize(x, dim=-1).unflatten(2, (k.shape[2], -1)).permute(2, 0, 1, 3, 4).flatten(1, 3) for x in (q, k)]
    both = torch.cat(parts, dim=1)
    return torch.linalg.eigh(both.mT @ both)[1][:, :, 0]


def fit_gates(mixer: FastWeightLayer, x_NTD: Tensor, heads: Heads) -> Tensor | None:
    """Set g_proj, and return the gates [M,n,T,H]; None where the mixer has none of this kind."""
    if mixer.options.output_gate != "head_sigmoid":
        return None
    targets = [1 - heads.sink, heads.local, *[1 - heads.sink] * mixer.options.time_scales]
    gate: Any = mixer.g_proj  # a Linear for the gate "head_sigmoid"
    # the first tokens see little else than the sink
    _regress(gate, x_NTD[:, 4:], _log_odds(torch.cat(targets[: mixer.options.time_scales], dim=-1))[:, 4:])
    return mixer.g_proj(x_NTD).sigmoid().unflatten(-1, (mixer.options.time_scales, -1)).permute(2, 0, 1, 3)


def fit_window(mixer: FastWeightLayer, x_NTD: Tensor, heads: Heads, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Set the window's scale and the logit of what lies outside, so that the mass there is the teacher's; returns what
    the window gives: its part [n,T,H,V] and the mass outside [n,T,H]."""
    window: Any = mixer.window

    def attend() -> tuple[Tensor, Tensor]:
        return window(MixerInputs(x_NTD), heads.q_rotated, heads.k_rotated, heads.v, Window(None, None), {})[:2]

    window.scale.fill_(softmax.scale)
    for parameter in window.outside.parameters():
        parameter.zero_()
    first = mixer.options.window + mixer.options.sinks  # before it nothing lies outside
    if first < x_NTD.shape[1]:
        missing = _log_odds(1 - heads.near) - _log_odds(attend()[1], least=1e-30)
        _regress(window.outside, x_NTD[:, first:], missing[:, first:])
    return attend()


def _log_odds(mass: Tensor, *, least: float = 1e-3) -> Tensor:
    return mass.clamp(least, 1 - max(least, 1e-6)).logit()


def _regress(linear: nn.Linear, x_NTD: Tensor, wanted_NTH: Tensor) -> None:
    """Set a Linear with bias to the ridge regression of `wanted_NTH` on x."""
    rows = torch.cat([x_NTD, torch.ones_like(x_NTD[..., :1])], dim=-1).flatten(0, 1)
    gram = rows.mT @ rows
    gram.diagonal().add_(1e-2 * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, rows.mT @ wanted_NTH.flatten(0, 1))
    linear.weight.copy_(weight[:-1].mT)
    linear.bias.copy_(weight[-1])
