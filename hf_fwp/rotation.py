"""Rotary position embedding, and the choice of rotated or plain queries and keys for each state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(x_BTHC: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of the first R components: x cos + (-x2, x1) sin."""
    size = cos_BTR.shape[-1]
    turned, passed = x_BTHC[..., :size], x_BTHC[..., size:]
    x1, x2 = turned.chunk(2, dim=-1)
    cos, sin = cos_BTR.unsqueeze(2).to(x_BTHC.dtype), sin_BTR.unsqueeze(2).to(x_BTHC.dtype)
    turned = turned * cos + torch.cat([-x2, x1], dim=-1) * sin
    return turned if not passed.shape[-1] else torch.cat([turned, passed], dim=-1)


def choose(plain: Tensor | None, rotated: Tensor | None, turned: Sequence[bool], scales: int) -> Tensor:
    """[B, T, len(turned), K]: for each state or read the head it comes from, rotated where `turned` says so."""
    per_scale = len(turned) // scales
    plain, rotated = (
        x if x is None or x.shape[2] == per_scale else x.repeat_interleave(per_scale // x.shape[2], dim=2)
        for x in (plain, rotated)
    )
    parts = []
    for start in range(0, len(turned), per_scale):
        of_scale = turned[start : start + per_scale]
        if plain is None or rotated is None or len(set(of_scale)) == 1:
            parts.append(rotated if of_scale[0] else plain)
        else:
            parts.append(torch.where(_flags(of_scale, plain.device)[:, None], rotated, plain))
    return torch.cat(parts, dim=2) if scales > 1 else parts[0]


def _flags(flags: Sequence[bool], device: torch.device) -> Tensor:
    """A bool tensor made on the device: a copy from the host could not be captured in a CUDA graph."""
    words = [flags[start : start + 32] for start in range(0, len(flags), 32)]
    bits = [sum(flag << i for i, flag in enumerate(word)) for word in words]
    places = [torch.arange(len(word), device=device) for word in words]
    return torch.cat([(word >> place) & 1 for word, place in zip(bits, places, strict=True)]).bool()
