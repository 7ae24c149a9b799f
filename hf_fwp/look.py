"""How pages and figures of this package look: one style for reports, benchmarks and inspections."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

OURS, THEIRS, OTHER = "#0b6e4f", "#8d99a6", "#d08c2e"
FIGURES: dict[RcKeyType, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "svg.hashsalt": "hf_fwp",  # the same report gives the same file
}
PAGE = """
  body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f5f6f8; margin: 0; }
  main { max-width: 960px; margin: 0 auto; padding: 24px 16px 64px; }
  h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 19px; margin: 40px 0 8px; }
  .quiet { color: #5c6773; } p { margin: 4px 0 12px; }
  .answer, .card { background: #fff; border: 1px solid #e1e4e8; border-radius: 10px; padding: 20px; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
  .tiles b { display: block; font-size: 24px; line-height: 1.25; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid #e9ebee; vertical-align: top; }
  th:first-child, td:first-child { text-align: left; } tr.ours { font-weight: 700; background: #eef7f3; }
  .scroll { overflow-x: auto; } img { width: 100%; height: auto; display: block; }
  details { margin-top: 12px; } summary { cursor: pointer; }
"""


def new_figure(width_height: tuple[float, float]) -> Figure:
    """An empty figure. Without pyplot nothing global is touched, and no display is looked for."""
    from matplotlib.figure import Figure  # of the extra [demo]

    return Figure(figsize=width_height, layout="constrained")


def image(figure: Figure) -> str:
    """A figure as the address of an image that a page holds in itself; the same figure gives the same address."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
