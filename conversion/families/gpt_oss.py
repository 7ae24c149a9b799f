"""Separate projections, and a learned sink per head in the denominator of the softmax: gpt_oss."""

from . import separate
from .moves import Place

WEIGHTS: dict[str, Place] = {
    **separate.WEIGHTS,
    "sinks": None,  # a fast weight has no softmax; calibration measures what the sink lets through, and fits a gate
}
