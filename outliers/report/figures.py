"""Figures: the one look of all plots, from an empty figure to the bytes of a PNG, SVG or PDF.

Title, axes, colours, legend, and numbers as people read them. Equal figures give equal bytes: no clock, no program name,
no state of pyplot. It knows nothing of what is drawn, but the words of the deciding rule.

There are two looks: the page's, 7.2 inches wide with a title, and a paper's, which is as wide as its column, has its letters in
the size in which they are printed, and no title, for a paper has captions (`look_of`).
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outliers.results.schema import CriteriaBlock
from outliers.spec import BLOCK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 7.2
COLUMN_INCHES = 3.4
"""One column of a paper in two columns."""
NARROW_INCHES = 5.0
LOWER = 0.75
"""Height of a narrow figure over that of the page's."""
PAPER_LETTERS = 0.79
"""9.5 points, the labels of the page, become 7.5; the smallest, 7.5, become 5.9."""
DPI = 180
"""1,296 pixels wide: sharp on a phone and in print, and far below 150 KB (48 layers, four sites)."""


@dataclass(frozen=True)
class Look:
    """How figures look. letters: factor of the sizes of letters. formats: `svg`, `pdf`: made besides the PNG."""

    width_inches: float = WIDTH_INCHES
    letters: float = 1.0
    titled: bool = True
    formats: tuple[str, ...] = ()

    @property
    def narrow(self) -> bool:
        """Whether there is no room for a legend next to the axes."""
        return self.width_inches < NARROW_INCHES


@dataclass(frozen=True)
class Plot:
    """One plot: `name` is its file name, `alt` plain text for who can't see it, `png` its bytes. vector: the bytes of
    other formats by their names, where a look asks for them."""

    name: str
    alt: str
    png: bytes
    vector: Mapping[str, bytes] = field(default_factory=dict)


# FreeType and the font caches of matplotlib are not promised to be safe between threads.
DRAWING = threading.RLock()
_LOOK: ContextVar[Look] = ContextVar("look", default=Look())  # noqa: B039  (frozen)


def look() -> Look:
    """The look in which figures are drawn now."""
    return _LOOK.get()


@contextlib.contextmanager
def look_of(wanted: Look) -> Iterator[None]:
    """In the block figures have another look than the page's."""
    token = _LOOK.set(wanted)
    try:
        yield
    finally:
        _LOOK.reset(token)


def paper_look(width_inches: float, formats: tuple[str, ...]) -> Look:
    """The look of a paper's column: letters of 6 to 7.5 points, whatever the width."""
    return Look(width_inches, PAPER_LETTERS, titled=False, formats=formats)


def pt(size: float) -> float:
    """A size of letters on the page, in points, as the look has it."""
    return size * look().letters


VECTOR_DPI = 300
"""Of a paper's PNG, and of the heat maps within an SVG or PDF."""
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
    """A figure of the look's width, without axes. height_inches: on the page; a narrower figure is lower."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    now = look()
    height = height_inches * (LOWER if now.narrow else 1)
    return FigureCanvasAgg(Figure(figsize=(now.width_inches, height), layout="constrained")).figure


def entitle(figure: Figure, axes: Axes | None, model: str, what: str, below: str) -> None:
    """Title (the model's name and `what`) and subtitle `below`; a name is never read as TeX. A paper's look has neither."""
    if not look().titled:
        return
    title = f"{ascii_text(model)}: {what}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=pt(12), fontweight="bold", color=INK, parse_math=False)
    if axes is None:  # of a solid, whose box is not where its axes are
        figure.text(0.012, 1 - 0.4 / figure.get_figheight(), below, fontsize=pt(8.5), color=MUTED, parse_math=False)
        return
    axes.set_title(below, loc="left", fontsize=pt(8.5), color=MUTED, parse_math=False, pad=8)


def dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, grid and colours of one plot."""
    axes.set_facecolor("white")
    axes.set_xlabel(x_label, fontsize=pt(9.5), color=INK)
    axes.set_ylabel(y_label, fontsize=pt(9.5), color=INK)
    axes.tick_params(labelsize=pt(8.5), colors=INK, length=3)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#a7afb9")


def plain_log(axes: Axes, which: str) -> None:
    """A log axis whose ticks read 1, 10, 1,000 instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", nonpositive="clip") if which == "x" else axes.set_yscale("log", nonpositive="clip")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    # each tick is an object to draw and to place: at 2 and 5 they are enough to read a log axis by
    axis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high < low * 100 else (2, 5), numticks=99))
    axis.set_minor_formatter(NullFormatter())
    if high < low * 100:  # the powers of ten alone would leave an axis of one tick
        axis.set_minor_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_tick_params(which="minor", labelsize=pt(8), length=2)


def _short(value: float) -> str:
    size, unit = (1e9, " G") if value >= 1e9 else (1e6, " M") if value >= 1e6 else (1, "")
    return f"{value / size:,.4g}{unit}" if value < 1e3 or unit else f"{value:,.0f}"


def mark_magnitude(axes: Axes, magnitude: float, *, vertical: bool = True) -> None:
    """A dashed line at the deciding magnitude."""
    line = axes.axvline if vertical else axes.axhline
    line(magnitude, color=DECIDING, linewidth=1.2, linestyle="--", label=f"magnitude {number(magnitude)}")


def legend(axes: Axes) -> None:
    """The legend, next to the axes, where it hides no line; above them in a narrow figure."""
    if look().narrow:
        size = {"fontsize": pt(8.5), "handlelength": 1.6, "columnspacing": 1.0, "handletextpad": 0.4}
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, **size)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=pt(8.5), frameon=False)


def ascii_text(text: str, most: int = 40) -> str:
    """A text as figures can show it: the font lacks many glyphs outside ASCII, and matplotlib would warn."""
    shown = re.sub(r"[^ -~]", "?", text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def finish(name: str, alt: str, figure: Figure) -> Plot:
    """The plot of a finished figure, in the formats of the look. name: of its PNG."""
    vector = {kind: _vector(figure, kind) for kind in look().formats if kind != "png"}
    return Plot(name, alt, png(figure), vector)


def _vector(figure: Figure, kind: str) -> bytes:
    """The figure as SVG or PDF with its text as text, and no date or program in it."""
    from matplotlib import rc_context

    undated: dict[str, dict[str, None]] = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    made = io.BytesIO()
    # a set salt makes the ids within an SVG those of its content; TrueType (42) is text that a reader can search
    with rc_context({"svg.hashsalt": "outliers", "svg.fonttype": "none", "pdf.fonttype": 42}):
        figure.set_facecolor("white")
        figure.savefig(made, format=kind, metadata=undated[kind], dpi=VECTOR_DPI)
    return made.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG with a palette, a third of the bytes of full colour; no date and no program's name in it.

    Lines, bars and letters have 64 colours, which is not visible; a figure with a scale of colours has 256.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    # not by savefig: it draws a figure with a layout twice, and packs it into a PNG that would be unpacked again here
    figure.set_dpi(DPI if look().titled else VECTOR_DPI)
    figure.set_facecolor("white")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib gives its methods no types
    canvas.draw()
    full = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # of Pillow's ways MAXCOVERAGE alone leaves no step in the colour bar: 5 of 255 at most, MEDIANCUT 32
    small = io.BytesIO()
    scaled = any(axes.get_label() == "<colorbar>" for axes in figure.axes)
    image = full.quantize(256 if scaled else 64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True, dpi=(figure.get_dpi(), figure.get_dpi()))
    return small.getvalue()


def page_image(picture: bytes) -> str:
    """A PNG as a page holds it: the same pixels as lossless WebP, 30% smaller, in base64."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        # of the slower settings the slowest is 3% smaller, in fifty times the time
        image.convert("RGB").save(small, "WEBP", lossless=True, quality=75, method=3)
    return base64.b64encode(small.getvalue()).decode()
