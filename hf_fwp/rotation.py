"""Rotary position embedding, and heads of which some are rotated and some are not."""

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


def choose_heads(plain: Tensor | None, rotated: Tensor | None, turned: Sequence[bool], scales: int) -> Tensor:
    """[B, T, len(turned), K]: for each state or read the head it comes from, rotated where `turned` says so."""
    per_scale = len(turned) // scales
    plain, rotated = (
        x if x is None or x.shape[2] == per_scale else x.repeat_interleave(per_scale // x.shape[2], dim=2)
        for x in (plain, rotated)
    )
    if plain is None or rotated is None or len(set(turned)) == 1:
        chosen = rotated if turned[0] else plain
        assert chosen is not None
        return chosen.repeat(1, 1, scales, 1) if scales > 1 else chosen
    flags_MH1 = _flags(turned, plain.device).view(scales, per_scale, 1)
    return torch.where(flags_MH1, rotated.unsqueeze(2), plain.unsqueeze(2)).flatten(2, 3)


def _flags(flags: Sequence[bool], device: torch.device) -> Tensor:
    """A bool tensor made on the device: a copy from the host could not be captured in a CUDA graph."""
    if device.type == "cpu":
        return torch.tensor(flags)
    words = [flags[start : start + 32] for start in range(0, len(flags), 32)]
    bits = [sum(flag << i for i, flag in enumerate(word)) for word in words]
    places = [torch.arange(len(word), device=device) for word in words]
    return torch.cat([(word >> place) & 1 for word, place in zip(bits, places, strict=True)]).bool()
