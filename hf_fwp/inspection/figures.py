"""One head of an inspection as a figure for a notebook or a paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..look import FIGURES, OTHER, OURS, THEIRS, new_figure
from .measures import LayerView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from . import Inspection


def head_figure(inspection: Inspection, layer: int, head: int) -> Figure:
    """Effective attention, the softmax map beside it where there is one, and the state over time."""
    if layer not in inspection.layers:
        raise ValueError(f"layer {layer} was not inspected; choose from {sorted(inspection.layers)}")
    view = inspection.layers[layer]
    reads = len(view.attention_RTT)
    if not 0 <= head < reads:
        raise ValueError(f"layer {layer} has heads 0 to {reads - 1}; {head} is none of them")
    from matplotlib import rc_context

    with rc_context(FIGURES):
        figure = new_figure((9, 6.5))
        fast, soft, lines, values = figure.subplots(2, 2).flat
        _map(fast, view.attention_RTT[head], "effective attention" if view.exact else "first-order shares of the read")
        softmax = inspection.softmax.get(layer)
        if softmax is None:
            soft.set_visible(False)
        else:
            _map(soft, softmax[head % len(softmax)], "softmax attention")
        _lines(lines, view, head)
        _singular(values, view, head)
        figure.suptitle(f"{inspection.model}: layer {layer}, head {head} ({view.rule})", fontsize=11)
    return figure


def _map(axes: Axes, weights_TT: Tensor, title: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    most = float(weights_TT.abs().max()) or 1.0
    colours = LinearSegmentedColormap.from_list("fast weights", [OTHER, "white", OURS])
    drawn = axes.imshow(weights_TT.numpy(), cmap=colours, vmin=-most, vmax=most, interpolation="nearest")
    axes.figure.colorbar(drawn, ax=axes, shrink=0.8)
    axes.grid(visible=False)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="token drawn on", ylabel="token that reads")


def _lines(axes: Axes, view: LayerView, head: int) -> None:
    ranks = axes.twinx()
    for number, (name, state) in enumerate(view.states.items()):
        colour = (OURS, OTHER, THEIRS)[number % 3]
        axes.plot(_of_head(state.norm_TS, view, head), color=colour, label=f"norm of {name}")
        rank = _of_head(state.rank_PS, view, head)
        ranks.plot(state.positions, rank, color=colour, linestyle=":", label=f"effective rank of {name} (right)")
    if view.beta_TS is not None:
        axes.plot(_of_head(view.beta_TS, view, head), color=THEIRS, linewidth=0.8, label="β")
    axes.set_xlabel("token")
    axes.set_ylim(bottom=0)
    ranks.set_ylim(bottom=0)
    ranks.grid(visible=False)
    lines = [*axes.get_lines(), *ranks.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8)


def _singular(axes: Axes, view: LayerView, head: int) -> None:
    for state in list(view.states.values())[:1]:
        axes.plot(state.positions, _of_head(state.singular_PSN, view, head), color=OURS, linewidth=0.8)
        axes.set(xlabel="token", title="singular values of the state")
        axes.title.set_fontsize(10)


def _of_head(x: Tensor, view: LayerView, head: int) -> Tensor:
    """What belongs to the state (dimension 1) that a head reads; several heads may read one state."""
    return x[:, head * x.shape[1] // len(view.attention_RTT)]
