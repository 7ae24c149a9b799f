"""Separate projections, and one norm over all heads together: olmo2, olmo3."""

from . import separate
from .moves import Cut, Place, by_head

WEIGHTS: dict[str, Place] = {
    **separate.WEIGHTS,
    "q_norm.weight": Cut(("q_norm.weight",), by_head),
    "k_norm.weight": Cut(("k_norm.weight",), by_head),
}
