"""Separate projections, of which the last is called out_proj: opt."""

from . import separate
from .moves import Place

WEIGHTS: dict[str, Place] = {
    **separate.WEIGHTS,
    "out_proj.weight": "o_proj.weight",
    "out_proj.bias": "o_proj.bias",
}
del WEIGHTS["o_proj.weight"], WEIGHTS["o_proj.bias"]
