"""Separate projections whose rotary pairs stand side by side; here they stand half a head apart: cohere."""

from . import separate
from .moves import Cut, Place, pairs_to_halves, scale_pairs_to_halves

WEIGHTS: dict[str, Place] = {
    **separate.WEIGHTS,
    "q_proj.weight": Cut(("q_proj.weight",), pairs_to_halves),
    "k_proj.weight": Cut(("k_proj.weight",), pairs_to_halves),
    "q_proj.bias": Cut(("q_proj.bias",), pairs_to_halves),
    "k_proj.bias": Cut(("k_proj.bias",), pairs_to_halves),
    "q_norm.weight": Cut(("q_norm.weight",), scale_pairs_to_halves),
    "k_norm.weight": Cut(("k_norm.weight",), scale_pairs_to_halves),
}
