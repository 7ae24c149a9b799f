"""Where a teacher's parameter goes: to a mixer's parameter of the same shape, cut into several, or nowhere.

H query heads, G key/value heads, K head size, V value head size, D hidden size; parameters are [rows, D] or [rows].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_fwp.options import MixerOptions

QKV_WEIGHTS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
QKV_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


@dataclass(frozen=True)
class Cut:
    """A parameter that becomes one or several of the mixer's, in another shape or order."""

    places: tuple[str, ...]
    cut: Callable[[Tensor, MixerOptions], Sequence[Tensor]]


Place = str | None | Cut


def places_of(place: Place) -> tuple[str, ...]:
    """The mixer's parameters that a teacher's parameter goes to."""
    if isinstance(place, Cut):
        return place.places
    return () if place is None else (place,)


def moved(place: Place, tensor: Tensor, options: MixerOptions) -> dict[str, Tensor]:
    """The mixer's parameters that are made of `tensor`; one that is not cut stays in the teacher's memory."""
    if isinstance(place, Cut):
        parts = place.cut(tensor, options)
        return {name: part.clone() for name, part in zip(place.places, parts, strict=True)}
    return dict.fromkeys(places_of(place), tensor)


def stacked(rows: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """[H K + G K + G V, ...]: all queries, then all keys, then all values."""
    keys, values = options.num_key_value_heads, options.num_value_heads
    sizes = [options.num_attention_heads * options.head_dim, keys * options.head_dim, values * options.value_head_dim]
    return rows.split(sizes)


def grouped(rows: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """[G (H/G + 2) K, ...]: for each key/value head its queries, its key and its value (V = K)."""
    groups = rows.unflatten(0, (options.num_key_value_heads, -1, options.head_dim))
    return [part.flatten(0, 2) for part in groups.split([groups.shape[1] - 2, 1, 1], dim=1)]


def transposed(columns: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """[D, rows] of a Conv1D."""
    return [columns.mT]


def stacked_columns(columns: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """[D, H K + G K + G V] of a Conv1D."""
    return stacked(columns.mT, options)


def plus_one(scale: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """The scale of a norm that is stored as its distance from 1."""
    return [1 + scale]


def by_head(scale: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """[H K] of a norm over all heads at once, as [H, K]."""
    return [scale.view(-1, options.head_dim)]


def pairs_to_halves(rows: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """[H K, ...], each head's components (even, odd) side by side; the even ones come first here."""
    pairs = rows.unflatten(0, (-1, options.head_dim // 2, 2))
    return [pairs.transpose(1, 2).flatten(0, 2)]


def scale_pairs_to_halves(scale: Tensor, options: MixerOptions) -> Sequence[Tensor]:
    """[H, K], ordered like `pairs_to_halves`."""
    return [scale.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)]
