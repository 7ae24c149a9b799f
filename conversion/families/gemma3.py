"""Separate projections, and head norms that store their scale as its distance from 1: gemma3."""

from . import separate
from .moves import Cut, Place, plus_one

WEIGHTS: dict[str, Place] = {
    **separate.WEIGHTS,
    "q_norm.weight": Cut(("q_norm.weight",), plus_one),
    "k_norm.weight": Cut(("k_norm.weight",), plus_one),
}
