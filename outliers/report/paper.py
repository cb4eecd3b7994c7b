"""The pictures of a study as files for a paper: as wide as its column, without titles, as SVG, PDF or PNG, with their captions.

Equal files give equal bytes under the same version of matplotlib. It takes the bytes of a study's files and returns bytes; it
knows no folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from outliers.errors import BadInput
from outliers.report.captions import ALL_TEXTS
from outliers.report.figures import COLUMN_INCHES, DRAWING, Plot, look_of, paper_look
from outliers.report.report import make_plots

FORMATS = ("svg", "pdf", "png")
MIN_INCHES, MAX_INCHES = 2.5, 12.0
CAPTIONS = "captions.md"


def check_formats(names: Sequence[str]) -> tuple[str, ...]:
    """The formats in the order of FORMATS. Raises BadInput for another name, or none."""
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise BadInput(
            f"--figures: {unknown[0] if unknown else 'nothing'!r} is not a format; give {', '.join(FORMATS)}"
        )
    return tuple(name for name in FORMATS if name in names)


def check_width(inches: float) -> float:
    """A width of figures in inches. Raises BadInput where nothing could be read or drawn at it."""
    if not MIN_INCHES <= inches <= MAX_INCHES:
        raise BadInput(
            f"--width: {inches:g} inches; give {MIN_INCHES:g} to {MAX_INCHES:g} (one column: {COLUMN_INCHES:g})"
        )
    return inches


def make_figures(
    files: Mapping[str, bytes],
    formats: tuple[str, ...],
    width_inches: float = COLUMN_INCHES,
    also: Callable[[], Sequence[tuple[Plot, str]]] | None = None,
) -> dict[str, bytes]:
    """Bytes by file name: each picture in each format, and captions.md.

    files: a study's files by name. also: draws more pictures, each with its caption, in the look that is set. Raises BadInput
    where a file is not readable.
    """
    with DRAWING, look_of(paper_look(width_inches, formats)):
        drawn = [(plot, " ".join(ALL_TEXTS[plot.name][1:])) for plot in make_plots(files)]
        drawn += also() if also is not None else []
    made: dict[str, bytes] = {}
    for plot, _ in drawn:
        stem = plot.name.removesuffix(".png")
        made |= {f"{stem}.{kind}": plot.png if kind == "png" else plot.vector[kind] for kind in formats}
    made[CAPTIONS] = _captions(drawn).encode()
    return made


def _captions(drawn: Sequence[tuple[Plot, str]]) -> str:
    """One section a picture: what it shows, and its text for those who don't see it."""
    parts = [
        f"## {plot.name.removesuffix('.png')}\n\n{caption}\n\nAlternative text: {plot.alt}\n" for plot, caption in drawn
    ]
    return "\n".join(parts)
