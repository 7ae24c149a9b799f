"""An inspection as one HTML file that needs no other file and no network. The page itself is page.html."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..look import OTHER, OURS, PAGE
from .measures import LayerView, StateView

if TYPE_CHECKING:
    from . import Inspection

DIGITS = 4
LEVELS = 127  # of a map's values, to either side of zero


def page(inspection: Inspection) -> str:
    """The page of an inspection."""
    from jinja2 import Environment  # of the extra [demo]

    template = (Path(__file__).parent / "page.html").read_text()
    # a text may hold "</script>"
    data = json.dumps(payload(inspection), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    values = {"model": inspection.model, "style": PAGE, "data": data, "positive": OURS, "negative": OTHER}
    return Environment(autoescape=True).from_string(template).render(values)


def payload(inspection: Inspection) -> dict[str, Any]:
    """What the page shows, as JSON."""
    return {
        "model": inspection.model,
        "against": inspection.against,
        "tokens": inspection.tokens,
        "total": inspection.total,
        "layers": [
            {
                "layer": layer_idx,
                "reads": inspection.reads.get(layer_idx),
                "writes": inspection.writes.get(layer_idx),
                "softmax": packed(inspection.softmax[layer_idx]) if layer_idx in inspection.softmax else None,
                **_layer(view),
            }
            for layer_idx, view in inspection.layers.items()
        ],
    }


def packed(maps_HTT: Tensor) -> list[dict[str, Any]]:
    """The lower triangles, row by row, as bytes: a value is `scale` times a signed byte."""
    length = maps_HTT.shape[-1]
    rows, columns = torch.tril_indices(length, length)
    found = []
    for values in maps_HTT[:, rows, columns].nan_to_num():
        scale = float(values.abs().max()) / LEVELS or 1.0
        levels = (values / scale).round().to(torch.int8).numpy().tobytes()
        found.append({"scale": scale, "bytes": base64.b64encode(levels).decode()})
    return found


def _layer(view: LayerView) -> dict[str, Any]:
    return {
        "rule": view.rule,
        "exact": view.exact,
        "attention": packed(view.attention_RTT),
        "read": _numbers(view.read_TR),
        "beta": None if view.beta_TS is None else _numbers(view.beta_TS),
        "decay": None if view.decay_TS is None else _numbers(view.decay_TS),
        "states": {name: _state(state) for name, state in view.states.items()},
    }


def _state(view: StateView) -> dict[str, Any]:
    return {
        "norm": _numbers(view.norm_TS),
        "change": _numbers(view.change_TS),
        "remains": _numbers(view.remains_TS),
        "positions": view.positions,
        "rank": _numbers(view.rank_PS),
        "singular": _numbers(view.singular_PSN),
    }


def _numbers(x: Tensor) -> Any:
    """Nested lists with a few digits."""
    return _rounded(x.double().nan_to_num().tolist())


def _rounded(values: Any) -> Any:
    return [_rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.{DIGITS}g}")
