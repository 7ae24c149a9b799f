"""Rotary positions in the forms that families hand to their attention, brought into one: cos and sin of cat(a, a).

halves      x cos + (-x2, x1) sin,  x = (x1, x2),  cos of cat(a, a)       most families
half_width  the same, cos of a                                            gpt_oss
pairs       x = (even, odd) components side by side, cos of each a twice  cohere: its weight map moves q and k
                                                                          from pairs to halves
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .table import find_host

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda x: x,
    "half_width": lambda x: torch.cat([x, x], dim=-1),
    "pairs": lambda x: torch.cat([x[..., ::2], x[..., ::2]], dim=-1),
}


def layer_rotates(config: Any, layer_idx: int) -> bool:
    """Whether the family's attention in this layer rotates queries and keys."""
    rotates = find_host(config).rotates
    said = getattr(config, rotates) if isinstance(rotates, str) else rotates
    return bool(said[layer_idx] if isinstance(said, list) else said)
