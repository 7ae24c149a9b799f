"""Rates from formulas instead of measurement: decay from the mean attention distance, beta from its entropy.

    d    = mean over queries of sum_t mass_qt (q - t)
    e    = mean over queries of -sum_t mass_qt log mass_qt / log(q + 1)            in [0, 1]
    decay: exp(g) = d / (d + 1),  so that the weights exp(g)^n of all ages n have the mean age d
    beta  = 1 - e                 a head that looks at one token writes fully, one that averages writes little

per head, the same for every token (after Taylor-Calibrate, as far as its facts are public). An attention sink spoils
both: half of the mass on the first token makes the distance as long as the text. Kept for comparison (recipes.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_fwp.layer import FastWeightLayer

from .calibrate import attention_heads, fit_gates, fit_window, masses, write_rates
from .softmax import Softmax

NEAREST = 0.05  # tokens; a head that looks at its own token alone still forgets within reason
BETAS = (0.02, 0.98)


@torch.no_grad()
def calibrate_by_formulas(
    mixer: FastWeightLayer,
    x_NTD: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    softmax: Softmax,
    heldout: int,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Set decay and write strength of all time scales by formula, and the gate as calibrate does.

    Arguments as in calibrate; nothing is judged, so that all sequences are looked at. `fixed` rates are taken as given.
    """
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)
    fit_gates(mixer, x_NTD, heads)
    if mixer.window is not None:
        fit_window(mixer, x_NTD, heads, softmax)
    distance_H, entropy_H = statistics(heads.q_rotated, heads.k_rotated, softmax)
    states = mixer.options.heads_of_states  # one per head, or one for a group of heads: their mean
    distance_S, entropy_S = (x.view(states, -1).mean(1) for x in (distance_H, entropy_H))
    forget_S = torch.log1p(1 / distance_S.clamp_min(NEAREST))  # -g
    found = {"half_life": math.log(2) / forget_S, "beta": (1 - entropy_S).clamp(*BETAS)}
    found |= {name: torch.full_like(found[name], value) for name, value in (fixed or {}).items() if name in found}
    inputs = {"half_life": "g", "beta": "beta"}
    setting = {name: value for name, value in found.items() if inputs[name] in mixer.rule.inputs}
    for scale in range(mixer.options.time_scales):
        write_rates(mixer, slice(scale * states, (scale + 1) * states), setting)
    chosen = {name: value.tolist() for name, value in setting.items()}
    return {"time_scales": [chosen] * mixer.options.time_scales, "rope_heads": mixer.options.rope_heads}


def statistics(q: Tensor, k: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """(mean distance in tokens, mean entropy as a share of the largest possible) [H] of attention by rotated q, k."""
    distance, entropy = (q.new_zeros(q.shape[2]) for _ in range(2))
    for rows, mass, back in masses(q, k, softmax):
        distance += (mass * back).sum((0, 2, 3))
        most = torch.arange(rows.start + 1, rows.start + len(back) + 1, device=q.device).log()
        share = -torch.xlogy(mass, mass).sum(-1) / most.clamp_min(1e-9)
        entropy += share.sum((0, 2))  # the first query has no choice: 0 of 0
    queries = q.shape[0] * q.shape[1]
    return distance / queries, entropy / (queries - q.shape[0])
