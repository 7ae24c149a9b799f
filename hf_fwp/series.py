"""Fast weights programmed in continuous time along a path, which a spline lays through all observations of a series.

    x(t)     natural cubic spline through the layer's inputs x_i at the times t_i
    dS/dt  = F(k(t), v(t), β(t), S)                     learning rules of rules/continuous_fwp.py
    S(t_0) = Δt F(k(t_0), ..., 0)                       Δt = `time_step`: the first observation has no past
    o_i    = S(t_i)ᵀ softmax(q(t_i))
    control = ode:      k, v, β, q from e(x)            a direct neural ODE
              dx_only:  k, v, β, q from e(ẋ + c)
              cde:      v from x;  k, β, q from e(ẋ + c)        c a learned bias, e the norm of the block

The solver rk4 makes `substeps` Runge-Kutta steps between two observations of a row, whatever their distance; its
gradient is that of the discretisation, of which few states are kept. rk4_adjoint keeps the states at the observations
only and integrates the adjoint equation backwards, an approximation. euler and exact_hold hold k, v, β as they are at
an observation since the one before.

Irie, Faccio, Schmidhuber 2022 (arXiv 2206.01649). Legend: rules/base.py; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache

from .cache import MixerInputs
from .layer import FastWeightLayer
from .options import MixerOptions
from .packing import Window, push_left, take, valid_tokens
from .rules.base import read
from .rules.continuous_fwp import derivative
from .rules.walk import segment_length

Field = Callable[[Tensor, Tensor], Tensor]

# What looks back over neighbouring tokens has no meaning between two of them.
WITHOUT_NEIGHBOURS: dict[str, Any] = {"conv_size": 0, "value_skip": 0, "rope_heads": "none", "time_scales": 1}


def pad_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of series of different lengths, as Trainer's `data_collator`.

    Each row has `inputs_embeds` [T, input_size] and may have `times` [T]; what else it has, `labels` for instance, is
    stacked. The batch is padded on the right with zeros, and `attention_mask` says what is real; integer `labels` [T]
    are padded with -100, which no loss counts.
    """
    series = {"inputs_embeds", "times"} & rows[0].keys()
    lengths = torch.tensor([len(row["inputs_embeds"]) for row in rows])
    batch = {
        name: pad_sequence([torch.as_tensor(row[name], dtype=torch.float32) for row in rows], batch_first=True)
        for name in sorted(series)
    }
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    others = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0].keys() - series}
    return batch | {name: _together(name, found, lengths.tolist()) for name, found in others.items()}


def _together(name: str, found: list[Tensor], lengths: list[int]) -> Tensor:
    """One entry of all rows: stacked, or padded where it is a label for each observation."""
    integers = name == "labels" and all(x.ndim == 1 and not x.is_floating_point() for x in found)
    if integers and [len(x) for x in found] == lengths:
        return pad_sequence(found, batch_first=True, padding_value=-100)
    return torch.stack(found)


@dataclass(frozen=True)
class Spline:
    """Natural cubic splines, one per row: values and second derivatives at the knots, and the distances of these.

    A row that is shorter than the others ends with distances of 0.
    """

    values_BTD: Tensor
    bends_BTD: Tensor
    gaps_BT: Tensor
    """[B, T - 1]"""

    @classmethod
    def through(cls, values_BTD: Tensor, times_BT: Tensor, mask_BT: Tensor | None = None) -> Spline:
        """The spline through values at increasing times; masked knots stand behind the others and may hold anything."""
        gaps_BT = times_BT[:, 1:] - times_BT[:, :-1]
        if mask_BT is not None:
            values_BTD = torch.where(mask_BT[..., None], values_BTD, 0)
            gaps_BT = torch.where(mask_BT[:, 1:], gaps_BT, 0)
        real_BT = torch.ones_like(gaps_BT, dtype=torch.bool) if mask_BT is None else mask_BT[:, 1:]
        if gaps_BT.device.type == "cpu" and not bool((gaps_BT > 0).logical_or(~real_BT).all()):
            raise ValueError("the times of a series must increase: two of them are equal, go back, or are NaN")
        gaps_BT = gaps_BT.to(values_BTD.dtype)
        return cls(values_BTD, _bends(values_BTD, gaps_BT), gaps_BT)

    def at(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values [B, D], derivatives [B, D] and the distance of the knots around it [B]; place i + u is a part u of the
        way from knot i to the next."""
        i = min(max(int(place), 0), self.gaps_BT.shape[1] - 1)
        gap_B1 = self.gaps_BT[:, i, None]
        ends = (self.values_BTD[:, i], self.values_BTD[:, i + 1], self.bends_BTD[:, i], self.bends_BTD[:, i + 1])
        return *_between(*ends, gap_B1, place - i), gap_B1[:, 0]

    def slopes(self) -> Tensor:
        """The derivatives at the knots, [B, T, D]."""
        y, m, gaps_BT1 = self.values_BTD, self.bends_BTD, self.gaps_BT[..., None]
        if y.shape[1] == 1:
            return torch.zeros_like(y)
        first = _between(y[:, 0], y[:, 1], m[:, 0], m[:, 1], gaps_BT1[:, 0], 0.0)[1]
        others = _between(y[:, :-1], y[:, 1:], m[:, :-1], m[:, 1:], gaps_BT1, 1.0)[1]
        return torch.cat([first[:, None], others], dim=1)


def _between(
    start: Tensor, end: Tensor, bend: Tensor, next_bend: Tensor, gap: Tensor, part: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Value and derivative of the cubic with these values and second derivatives at its ends; 0 slope without a gap."""
    left = 1 - part
    value = left * start + part * end
    value = value + gap**2 / 6 * ((left**3 - left) * bend + (part**3 - part) * next_bend)
    slope = torch.where(gap > 0, (end - start) / torch.where(gap > 0, gap, 1), 0)
    return value, slope + gap / 6 * ((1 - 3 * left**2) * bend + (3 * part**2 - 1) * next_bend)


def _bends(values_BTD: Tensor, gaps_BT: Tensor) -> Tensor:
    """Second derivatives at the knots: a tridiagonal system that is 0 at the two ends of each row."""
    knots = values_BTD.shape[1]
    if knots < 3:
        return torch.zeros_like(values_BTD)
    safe_BT1 = torch.where(gaps_BT > 0, gaps_BT, 1)[..., None]
    slopes = ((values_BTD[:, 1:] - values_BTD[:, :-1]) / safe_BT1).unbind(1)
    gaps, inner = safe_BT1.unbind(1), (gaps_BT[:, 1:] > 0)[..., None].unbind(1)
    zero = torch.zeros_like(values_BTD[:, 0])
    upper, right = [zero[:, :1]], [zero]
    for i in range(1, knots - 1):  # elimination
        pivot = 2 * (gaps[i - 1] + gaps[i]) - gaps[i - 1] * upper[-1]
        upper.append(torch.where(inner[i - 1], gaps[i] / pivot, 0))
        bend = (6 * (slopes[i] - slopes[i - 1]) - gaps[i - 1] * right[-1]) / pivot
        right.append(torch.where(inner[i - 1], bend, 0))
    bends = [zero]
    for i in reversed(range(knots - 1)):  # substitution
        bends.append(right[i] - upper[i] * bends[-1])
    return torch.stack(bends[::-1], dim=1)


def solve(
    field: Field, start: Tensor, knots: int, *, substeps: int = 1, adjoint: Iterable[Tensor] | None = None
) -> Tensor:
    """The states [knots, ...] of dS/ds = field(s, S) at s = 0, 1, ..., from `start`; Runge-Kutta of order 4.

    `adjoint` holds the tensors that `field` depends on, for gradients by the adjoint equation. At a whole s the field
    is asked just before or just behind it, so it may jump there. Raises ImportError without torchdiffeq.
    """
    try:
        import torchdiffeq
    except ImportError as missing:
        raise ImportError("solver 'rk4' needs torchdiffeq: pip install hf_fwp[ode]") from missing
    options: dict[str, Any] = {"method": "rk4", "options": {"perturb": True}}
    grid = torch.arange((knots - 1) * substeps + 1, dtype=start.dtype, device=start.device) / substeps
    if knots == 1:
        return start[None]
    if adjoint is not None:
        found: Any = torchdiffeq.odeint_adjoint(field, start, grid, adjoint_params=tuple(adjoint), **options)
        return found[::substeps]

    def between(state: Tensor, places: Tensor) -> Any:
        return torchdiffeq.odeint(field, state, places, **options)

    if not torch.is_grad_enabled():
        return between(start, grid)[::substeps]
    states, size = [start[None]], segment_length(knots) * substeps
    for first in range(0, len(grid) - 1, size):
        segment: Any = checkpoint(between, states[-1][-1], grid[first : first + size + 1], use_reentrant=False)
        states.append(segment[substeps::substeps])
    return torch.cat(states)


class SplineLayer(FastWeightLayer):
    """A mixer that is programmed along a path. It reads what stands before the block's norm, and no cache."""

    def __init__(self, options: MixerOptions, layer_idx: int) -> None:
        for name, without in WITHOUT_NEIGHBOURS.items():
            if getattr(options, name) != without:
                raise ValueError(
                    f"{name} is {getattr(options, name)!r}, but continuous_fwp with control "
                    f"{options.rule_options['control']!r} and solver {options.rule_options['solver']!r} follows a path "
                    f"between the observations; set it to {without!r}"
                )
        super().__init__(options, layer_idx)
        if options.rule_options["control"] != "ode":
            self.slope_bias = nn.Parameter(torch.empty(options.hidden_size))
        self.init_weights()

    def init_weights(self) -> None:
        """The bias of the derivative about as large as what it is added to."""
        super().init_weights()
        if "slope_bias" in self._parameters:
            init.normal_(self.slope_bias, std=self.options.initializer_range)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        times: Tensor | None = None,
        encode: nn.Module | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(output [B, T, D], None) for times [B, T], multiples of `time_step` where None; masked positions give 0."""
        if past_key_values is not None or cu_seqlens is not None:
            given = "a cache" if cu_seqlens is None else "a packed batch"
            raise ValueError(f"a spline goes through a whole series, one per row; {given} cannot be used with it")
        batch, length, _ = hidden_states.shape
        mask_BT = valid_tokens(attention_mask, batch=batch, length=length)
        if times is None:
            steps = torch.arange(length, device=hidden_states.device) if mask_BT is None else mask_BT.cumsum(1)
            times = (self.options.rule_options["time_step"] * steps).expand(batch, length)
        tokens = MixerInputs(hidden_states, mask_BT, times_BT=times)
        if mask_BT is None:
            return self.o_proj(self._along(tokens, encode or nn.Identity())), None
        order_BT, back_BT = push_left(mask_BT)
        reads = self._along(tokens.change(lambda x: take(x, order_BT)), encode or nn.Identity())
        out_BTD = self.o_proj(take(reads, back_BT))
        return out_BTD.masked_fill(~mask_BT[..., None], 0), None

    def _along(self, tokens: MixerInputs, encode: nn.Module) -> Tensor:
        """The reads at the observations, real ones first."""
        assert tokens.times_BT is not None
        spline = Spline.through(tokens.hidden_BTD, tokens.times_BT, tokens.mask_BT)
        options = self.options.rule_options
        inputs, encoded_BTD = self._programmed(spline.values_BTD, spline.slopes(), encode)
        if options["solver"].startswith("rk4"):
            out_BTHV = self._solved(spline, inputs, encode, options)
        else:
            window = Window(tokens.mask_BT, None)
            first = options["time_step"]
            inputs["dt"], _ = window.elapsed(tokens.times_BT, None, first=first, like=inputs["b"])
            out_BTHV, _ = self.rule.apply(**inputs, mask=tokens.mask_BT, options=options, backend=self.options.backend)
            self.backend_ran = "torch"
        out_BTHV = out_BTHV if self.options.scale is None else self.options.scale * out_BTHV
        if tokens.mask_BT is not None:
            out_BTHV = torch.where(tokens.mask_BT[..., None, None], out_BTHV, 0)
        return self._gated(out_BTHV.to(encoded_BTD.dtype), encoded_BTD)

    def _programmed(self, x_BTD: Tensor, slope_BTD: Tensor, encode: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        """The rule's inputs, one per state, and the encoding that most of them are made from."""
        assert self.own is not None
        control = self.options.rule_options["control"]
        encoded_BTD = encode(x_BTD if control == "ode" else slope_BTD + self.slope_bias)
        tokens = MixerInputs(encoded_BTD)
        projected, _ = self._projected(tokens, {}, None)
        if control == "cde":
            projected["v"] = self.v_proj(x_BTD)
        inputs, _ = self._queries_keys_values(projected, tokens, Window(None, None), {})
        heads = inputs["v"].shape[2]
        inputs |= {name: x.repeat_interleave(heads // x.shape[2], dim=2) for name, x in inputs.items()}
        return {**inputs, **self.own.of(encoded_BTD)}, encoded_BTD

    def _solved(
        self, spline: Spline, inputs: Mapping[str, Tensor], encode: nn.Module, options: Mapping[str, Any]
    ) -> Tensor:
        """The reads [B, T, H, V] of the solution at the knots."""
        compute = torch.promote_types(spline.values_BTD.dtype, torch.float32)
        device, rule = spline.values_BTD.device.type, options["learning_rule"]

        def change(state: Tensor, now: Mapping[str, Tensor]) -> Tensor:
            k, v, b = (now[name].to(compute) for name in "kvb")
            with torch.autocast(device, enabled=False):
                return derivative(state, k=k, v=v, b=b, learning_rule=rule)

        def field(place: Tensor, state: Tensor) -> Tensor:
            x_BD, slope_BD, gap_B = spline.at(place)
            now = self._programmed(x_BD[:, None], slope_BD[:, None], encode)[0]
            gap_B111 = gap_B.to(compute)[:, None, None, None]
            return gap_B111 * change(state, {name: x[:, 0] for name, x in now.items()})

        start = {name: x[:, 0] for name, x in inputs.items()}
        empty = start["k"].new_zeros(*start["k"].shape, start["v"].shape[-1], dtype=compute)
        adjoint: Sequence[Tensor] | None = None
        if options["solver"] == "rk4_adjoint":
            # clones: the bends come from the values, whose gradient would else be counted along both ways
            spline = Spline(spline.values_BTD.clone(), spline.bends_BTD.clone(), spline.gaps_BT.clone())
            found = (spline.values_BTD, spline.bends_BTD, spline.gaps_BT, *self.parameters(), *encode.parameters())
            adjoint = [x for x in found if x.requires_grad]
        first = options["time_step"] * change(empty, start)
        states = solve(field, first, spline.values_BTD.shape[1], substeps=options["substeps"], adjoint=adjoint)
        self.backend_ran = "torchdiffeq"
        with torch.autocast(device, enabled=False):
            q = inputs["q"].to(compute).softmax(-1)
            return torch.stack([read(state, query) for state, query in zip(states, q.unbind(1), strict=True)], dim=1)
