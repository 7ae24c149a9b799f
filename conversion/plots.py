"""The plots of a report, each an SVG image that a page can hold in itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_fwp.card import TIMES, number
from hf_fwp.look import FIGURES, OTHER, OURS, THEIRS, image, new_figure

if TYPE_CHECKING:
    pass


def draw(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Each plot as the address of an image; None where the report (or the `rows` of its table) holds nothing for it."""
    from matplotlib import rc_context  # of the extra [demo]

    with rc_context(FIGURES):
        return {
            "quality": _quality_plot(rows),
            "layers": _layers_plot(report),
            "half_lives": _half_lives_plot(report),
            "decode": _decode_plot(report["decode"]) if report.get("decode") else None,
            "history": _history_plot(report.get("stages", {})),
        }


def _quality_plot(rows: Sequence[Mapping[str, Any]]) -> str | None:
    rows = [row for row in rows if row["ratio"] is not None][::-1]
    if len(rows) < 2:
        return None
    figure = new_figure((9, 0.55 + 0.42 * len(rows)))
    axes = figure.subplots()
    colours = [{"model": OURS, None: THEIRS}.get(row.get("key"), OTHER) for row in rows]
    bars = axes.barh([row["name"] for row in rows], [row["ratio"] for row in rows], color=colours, height=0.6, left=0)
    axes.bar_label(bars, [f"{number(row['ratio'])} {TIMES}" for row in rows], padding=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0.8, max(2.5, 2.2 * max(row["ratio"] for row in rows)))
    axes.axvline(1, color="#1c2430", linewidth=1)
    axes.set_xlabel("perplexity relative to the teacher's (logarithmic; 1 is the teacher)")
    axes.grid(axis="y", visible=False)
    return image(figure)


def _layers_plot(report: Mapping[str, Any]) -> str | None:
    shown = [("residual", report.get("residuals")), ("KL when converted alone", report.get("ranking"))]
    shown = [(label, values) for label, values in shown if values]
    if not shown:
        return None
    figure = new_figure((9, 2.3 * len(shown)))
    kept = {int(layer) for layer in report.get("kept_layers", [])}
    last = report.get("num_layers", 1 + max(int(layer) for _, values in shown for layer in values)) - 1
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, values) in zip(panels, shown, strict=True):
        layers = [int(layer) for layer in values]
        axes.bar(layers, list(values.values()), color=[THEIRS if layer in kept else OURS for layer in layers])
        for layer in kept - set(layers):
            axes.axvspan(layer - 0.4, layer + 0.4, color="#eef0f2")
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.7, last + 0.7)
    panels[-1].set_xlabel("layer")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return image(figure)


def _half_lives_plot(report: Mapping[str, Any]) -> str | None:
    """Every head's half-life over the layers, a colour for each time scale."""
    points: dict[int, list[tuple[int, float]]] = {}
    for layer, choice in report.get("choices", {}).items():
        for scale, setting in enumerate(choice.get("time_scales", ())):
            points.setdefault(scale, []).extend((int(layer), value) for value in setting.get("half_life", ()))
    if not any(points.values()):
        return None
    figure = new_figure((9, 2.5))
    axes = figure.subplots()
    for scale, found in points.items():
        offset = 0.3 * (scale - (len(points) - 1) / 2)  # side by side
        layers, values = [layer + offset for layer, _ in found], [value for _, value in found]
        axes.scatter(layers, values, s=14, alpha=0.5, color=(OURS, OTHER)[scale % 2], label=f"time scale {scale + 1}")
    axes.set(xlabel="layer", ylabel="half-life (tokens)", yscale="log")
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return image(figure)


def _decode_plot(decode: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    from matplotlib.ticker import LogLocator

    figure = new_figure((9, 2.7))
    panels = (
        ("tokens_per_s", "decoded tokens per second", 1, "linear"),
        ("prefill_s", "seconds to read the context", 1, "log"),
        ("cache_bytes", "cache in MiB", 2**20, "log"),
    )
    for axes, (key, title, unit, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for who, colour, label in (("teacher", THEIRS, "teacher"), ("student", OURS, "this model")):
            rows = decode.get(who, [])
            axes.plot(
                [row["length"] for row in rows], [row[key] / unit for row in rows], "o-", color=colour, label=label
            )
        axes.set(title=title, xlabel="tokens of context", xscale="log", yscale=scale)
        axes.title.set_fontsize(10)
        lengths = sorted({row["length"] for rows in decode.values() for row in rows})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        if scale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        if scale == "linear":
            axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    return image(figure)


def _history_plot(stages: Mapping[str, Mapping[str, Any]]) -> str | None:
    trained = {name: stage["history"] for name, stage in stages.items() if len(stage.get("history") or []) > 1}
    if not trained:
        return None
    figure = new_figure((9, 2.5))
    for axes, (name, history) in zip(figure.subplots(1, len(trained), squeeze=False)[0], trained.items(), strict=True):
        measure = next(key for key in history[0] if key != "step")
        entries = [entry for entry in history if entry.get(measure) is not None]
        axes.plot([entry["step"] for entry in entries], [entry[measure] for entry in entries], color=OURS)
        axes.set(title=name, xlabel="step", ylabel=measure)
    return image(figure)
