"""Figures: the one look of all plots, from an empty figure to PNG bytes.

Title, axes, colours, legend, and numbers as people read them. Equal figures give equal bytes: no clock, no program name,
no state of pyplot. It knows nothing of what is drawn, but the words of the deciding rule.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from outliers.results.schema import CriteriaBlock
from outliers.spec import BLOCK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 7.2
DPI = 200
"""1,440 pixels wide: sharp on a phone and in print, and far below 150 KB (48 layers, four sites)."""

INK, MUTED, GRID, DECIDING = "#1b1f24", "#667080", "#e3e6ea", "#b4232c"
SITE_COLOURS = {
    "attn_in": "#0072b2",
    "mlp_in": "#e08214",
    "o_in": "#009e73",
    "down_in": "#d55e00",
    "resid": "#8e44ad",
    BLOCK: "#333333",
}
# (colour, line, marker): lines of different readings often lie on each other, so they differ in more than colour
READING_STYLES = {
    "pooled": ("#0072b2", "-", "o"),
    "union": ("#e08214", "--", "s"),
    "per_layer": ("#009e73", "-.", "^"),
    "affected": ("#8e44ad", ":", "D"),
}


def percent(share: float) -> str:
    """`share` (0 to 1) for people: 25%, 6.25%."""
    return f"{float(f'{share * 100:.3g}'):g}%"


def number(value: float) -> str:
    """A magnitude with four digits, thousands separated: 6, 5.985, 33.75, 12,040."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def criterion(rule: CriteriaBlock) -> str:
    """The deciding rule in one line."""
    return (
        f"{rule.reading} at {rule.site}: abs(x) ≥ {number(rule.magnitude)} in at least "
        f"{percent(rule.layer_fraction)} of layers and {percent(rule.position_fraction)} of tokens"
    )


def new_figure(height_inches: float) -> Figure:
    """A figure of the one width, without axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")).figure


def entitle(figure: Figure, axes: Axes, model: str, what: str, below: str) -> None:
    """Title (the model's name and `what`) and subtitle `below`; a name is never read as TeX."""
    # the font lacks many glyphs outside ASCII, and matplotlib would warn
    name = re.sub(r"[^ -~]", "?", model)
    title = f"{name if len(name) <= 40 else name[:39] + '…'}: {what}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    axes.set_title(below, loc="left", fontsize=8.5, color=MUTED, parse_math=False, pad=8)


def dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, grid and colours of one plot."""
    axes.set_facecolor("white")
    axes.set_xlabel(x_label, fontsize=9.5, color=INK)
    axes.set_ylabel(y_label, fontsize=9.5, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#a7afb9")


def plain_log(axes: Axes, which: str) -> None:
    """A log axis whose ticks read 1, 10, 1,000 instead of powers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log", nonpositive="clip") if which == "x" else axes.set_yscale("log", nonpositive="clip")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())
    if high < low * 100:  # the powers of ten alone would leave an axis of one tick
        axis.set_minor_formatter(FuncFormatter(lambda value, _: _short(value) if f"{value:e}"[0] in "235" else ""))
    axis.set_tick_params(which="minor", labelsize=8, length=2)


def _short(value: float) -> str:
    size, unit = (1e9, " G") if value >= 1e9 else (1e6, " M") if value >= 1e6 else (1, "")
    return f"{value / size:,.4g}{unit}" if value < 1e3 or unit else f"{value:,.0f}"


def mark_magnitude(axes: Axes, magnitude: float, *, vertical: bool = True) -> None:
    """A dashed line at the deciding magnitude."""
    line = axes.axvline if vertical else axes.axhline
    line(magnitude, color=DECIDING, linewidth=1.2, linestyle="--", label=f"magnitude {number(magnitude)}")


def legend(axes: Axes) -> None:
    """The legend, next to the axes, where it hides no line."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5, frameon=False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, a third of the bytes of full colour; no date and no program's name in it."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    # not by savefig: it draws a figure with a layout twice, and packs it into a PNG that would be unpacked again here
    figure.set_dpi(DPI)
    figure.set_facecolor("white")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib gives its methods no types
    canvas.draw()
    full = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # of Pillow's ways MAXCOVERAGE alone leaves no step in the colour bar: 5 of 255 at most, MEDIANCUT 32
    small = io.BytesIO()
    image = full.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True, dpi=(DPI, DPI))
    return small.getvalue()
