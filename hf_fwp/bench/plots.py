"""Results of benches as bars: one group for everything that is comparable, one bar for each that took part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..look import OTHER, OURS, THEIRS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = Mapping[str, Mapping[str, float]]
"""Who took part -> group -> value."""
COLOURS = (OURS, THEIRS, OTHER, "#5b7db1", "#a65e8b", "#7d7f3c")
LONG = 10  # values whose ratio is larger are drawn on a logarithmic axis


def bars(series: Series, *, axis: str, title: str | None = None) -> Figure:
    """Lying bars; `axis` says what they measure. The first of the series is drawn as ours."""
    groups = list(dict.fromkeys(group for values in series.values() for group in values))
    figure = new_figure((9, 1 + 0.18 * len(groups) * (1 + len(series))))
    axes, height = figure.subplots(), 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [groups.index(group) + i * height for group in values]
        axes.barh(places, list(values.values()), height, label=name, color=COLOURS[i % len(COLOURS)])
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], groups, fontsize=8)
    known = [value for values in series.values() for value in values.values()]
    if min(known) > 0 and max(known) > LONG * min(known):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(axis)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    if title is not None:
        axes.set_title(title)
    return figure
