"""The phase transition as pictures: number of features, and share of layers, against the size of a model.

Each chart is one inline SVG that scales with the page and takes its colours from the page's style; a point bears the number of
its row in the table and, where there is room, its model's name. It judges nothing and knows no HTML page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from outliers.atlas.reference import PAPER, PAPER_RULE, PaperModel
from outliers.atlas.row import AtlasRow, Conditions
from outliers.report.figures import percent
from outliers.report.page import printable
from outliers.spec import BLOCK, BLOCK_SITES, short_model_name
from outliers.units import clip, plural

WIDTH, HEIGHT = 400, 264
LEFT, RIGHT, TOP, BOTTOM = 50.0, 390.0, 12.0, 226.0
MAX_NUMBERED = 40
"""With more points the numbers of their rows hide each other."""
NAMED_REFERENCE = 6
"""With more studies the names of the reference's models are left to the mouse: they would hide those of the studies."""
MAX_NAME = 18
"""Characters of a model's name next to its point."""
LINEAR_UP_TO = 40
"""Features up to which the axis is linear, as in the report's sweep."""
DIGIT, LINE = 5.4, 9.0
"""Width of a character and height of a text next to a point, in the chart's units, measured at 9 units in Arial."""


@dataclass(frozen=True)
class Chart:
    """One chart: a heading, the picture, and a note about studies that are not in it."""

    heading: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Charts:
    """The charts of one group, and why others would show nothing."""

    drawn: tuple[Chart, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    low: float | None
    high: float | None
    number: int
    name: str
    style: str
    title: str
    mark: str


@dataclass(frozen=True)
class _Axis:
    """Values to places; `ticks` are (value, text)."""

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


SMALLEST, LARGEST = 1e-3, 1e18
"""Sizes that are drawn. No model has more parameters; a perplexity beyond is that of a broken one, and stands in the table."""


@dataclass(frozen=True)
class _Quantity:
    """What an axis shows: of a row, and of a model of the paper."""

    name: str
    label: str
    of: Callable[[AtlasRow], float | None]
    of_paper: Callable[[PaperModel], float]
    missing: str = ""


_SIZES = (
    _Quantity(
        "parameters",
        "parameters (total)",
        lambda row: row.total_parameters,
        lambda model: model.parameters,
        "no study here knows its model's parameters",
    ),
    _Quantity(
        "active parameters",
        "active parameters (a token)",
        lambda row: row.active_parameters,
        lambda model: model.parameters,
        "no study here knows its model's active parameters",
    ),
    _Quantity(
        "perplexity",
        "perplexity (better to the right)",
        lambda row: row.perplexity,
        lambda model: model.perplexity,
        Markup("measured by no study here (<code>--perplexity</code>)"),
    ),
)
_COUNT = _Quantity("Features", "systematic features", lambda row: row.num_features, lambda model: model.num_features)
_LAYERS = _Quantity(
    "Share of layers", "share of layers", lambda row: row.layer_fraction, lambda model: model.layer_fraction
)


def usual_conditions(rows: Iterable[AtlasRow]) -> Conditions:
    """Corpus and arithmetic of most rows; of the first in order where there is a tie."""
    found = Counter(row.conditions for row in rows)
    return min(found, key=lambda own: (-found[own], str(own)))


def comparable_with_paper(row: AtlasRow) -> bool:
    """Whether LLM.int8()'s table was made under this row's criteria: its magnitude and shares, at a linear layer's input."""
    return row.criteria[2:] == PAPER_RULE and row.site in (BLOCK, *BLOCK_SITES)


def charts(rows: Sequence[AtlasRow], first_number: int, mark: Callable[[AtlasRow], str] = lambda row: "") -> Charts:
    """The charts of one group of identical criteria; its rows are numbered from `first_number` on.

    Each of features and of shares of layers, by parameters, by active ones where a model has others, and by perplexity. A study
    that is alone is drawn by its parameters only, with the reference; without one there is nothing to set it against.

    mark: a class of the page's style that all that is drawn of a row has; empty: none.
    """
    if len(rows) == 1 and not comparable_with_paper(rows[0]):
        return Charts((), ())
    sizes = [size for size in _SIZES if size is _SIZES[0] or len(rows) > 1]
    if all(row.active_parameters in (None, row.total_parameters) for row in rows):
        sizes = [size for size in sizes if size is not _SIZES[1]]
    made = [_chart(rows, first_number, size, what, mark) for what in (_COUNT, _LAYERS) for size in sizes]
    missing = dict.fromkeys(reason for reason in made if not isinstance(reason, Chart))
    return Charts(tuple(chart for chart in made if isinstance(chart, Chart)), tuple(missing))


def _chart(
    rows: Sequence[AtlasRow],
    first_number: int,
    size: _Quantity,
    what: _Quantity,
    mark: Callable[[AtlasRow], str],
) -> Chart | str:
    """One chart, or why it would show no study."""
    usual, paper = usual_conditions(rows), comparable_with_paper(rows[0])
    heading = f"{what.name} by {size.name}"
    points = []
    for number, row in enumerate(rows, first_number):
        x, y = size.of(row), what.of(row)
        if x is None or y is None or not _drawn(x):
            continue
        # a share of layers has no interval: it only grows with the corpus
        low, high = (row.num_features_low, row.num_features_high) if what is _COUNT else (None, None)
        style = ("moe" if row.num_experts else "dense") + (" other" if row.conditions != usual else "")
        name = clip(printable(short_model_name(row.model)), MAX_NAME)
        points.append(_Point(x, y, low, high, number, name, style, _title(row, number), mark(row)))
    if not points:
        if any(size.of(row) for row in rows):
            return Markup("share of layers: no study here has a systematic feature")
        return Markup("by {}: {}").format(size.name, size.missing)
    known_models = [(size.of_paper(model), what.of_paper(model), model) for model in PAPER] if paper else []
    note = f"{len(points):,} of {len(rows):,} studies" if len(points) < len(rows) else ""
    # of all rows, also those without a share of layers: the charts below each other have one scale
    sizes = [x for row in rows if (x := size.of(row)) is not None and _drawn(x)]
    x_axis = _log_axis(sizes + [x for x, _, _ in known_models], reverse=size is _SIZES[2])
    tops = [p.high if p.high is not None else p.y for p in points] + [y for _, y, _ in known_models]
    y_axis = _share_axis() if what is _LAYERS else _count_axis(max(tops))
    y_label = what.label + (", log scale" if what is _COUNT and max(tops) > LINEAR_UP_TO else "")
    parts = [_frame(x_axis, y_axis, f"{size.label}, log scale", y_label), *_paper_line(known_models, x_axis, y_axis)]
    parts += [_whisker(point, x_axis, y_axis) for point in points]
    parts += [_dot(point, x_axis, y_axis) for point in points]
    if len(rows) <= MAX_NUMBERED:
        names = [model.model if len(rows) <= NAMED_REFERENCE else "" for _, _, model in known_models]
        others = [(x_axis.place(x), y_axis.place(y), name) for (x, y, _), name in zip(known_models, names, strict=True)]
        parts += _names([(x_axis.place(p.x), y_axis.place(p.y), p) for p in points], others)
    said = f"{heading}: {len(points)} {'studies' if len(points) != 1 else 'study'}"
    said += f", and {len(known_models)} models of LLM.int8() as reference" if known_models else ""
    svg = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return Chart(heading, svg.format(WIDTH, HEIGHT, said, Markup("").join(parts)), note)


def _drawn(size: float) -> bool:
    """Whether a size has a place on the axis that all studies share: one study's claim must not squeeze the others together."""
    return SMALLEST < size < LARGEST


def _title(row: AtlasRow, number: int) -> str:
    share = "" if row.layer_fraction is None else f", {percent(row.layer_fraction)} of layers"
    count = f"{row.num_features:,} feature{plural(row.num_features)}"
    corpus = f"{row.corpus_name or row.corpus}, {row.num_sequences:,} × {row.sequence_length:,} tokens, {row.dtype}"
    return printable(f"{number}: {clip(row.model_called, 120)}: {count}{share} ({clip(corpus, 160)})")


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> Markup:
    """Grid, ticks, and the labels of both axes."""
    parts = [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick end" x="{}" y="{}">{}</text>'
        ).format(LEFT, RIGHT, y, y, LEFT - 5, _round(y + 3.4), text)
        for value, text in y_axis.ticks
        for y in [_round(y_axis.place(value))]
    ]
    parts += [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick mid" x="{}" y="{}">{}</text>'
        ).format(x, x, TOP, BOTTOM, x, BOTTOM + 14, text)
        for value, text in x_axis.ticks
        for x in [_round(x_axis.place(value))]
    ]
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, RIGHT, BOTTOM, BOTTOM)
        + Markup('<text class="label mid" x="{}" y="{}">{}</text>').format((LEFT + RIGHT) / 2, HEIGHT - 6, x_label)
        + Markup('<text class="label mid" transform="translate(12 {}) rotate(-90)">{}</text>').format(
            (TOP + BOTTOM) / 2, y_label
        )
    )
    return Markup("").join(parts)


def _paper_line(models: Sequence[tuple[float, float, PaperModel]], x_axis: _Axis, y_axis: _Axis) -> list[Markup]:
    """LLM.int8()'s models, joined in the order of the axis."""
    if not models:
        return []
    placed = sorted((_round(x_axis.place(x)), _round(y_axis.place(y)), model) for x, y, model in models)
    line = " ".join(f"{x},{y}" for x, y, _ in placed)
    parts = [Markup('<polyline class="paper" points="{}"/>').format(line)]
    for x, y, model in placed:
        said = (
            f"{model.model} (LLM.int8()): {model.num_features} features, {percent(model.layer_fraction)} of layers, "
            f"perplexity {model.perplexity:g}"
        )
        corners = f"M{x} {_round(y - 3.4)}l3.4 3.4l-3.4 3.4l-3.4 -3.4z"
        parts.append(Markup('<path class="paper-point" d="{}"><title>{}</title></path>').format(corners, said))
    return parts


def _whisker(point: _Point, x_axis: _Axis, y_axis: _Axis) -> Markup:
    if point.low is None or point.high is None or point.low == point.high:
        return Markup("")
    x = _round(x_axis.place(point.x))
    low, high = (_round(y_axis.place(end)) for end in (point.low, point.high))
    line = Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(point.style, x, x, low, high)
    return _marked(point, line)


def _dot(point: _Point, x_axis: _Axis, y_axis: _Axis) -> Markup:
    x, y = _round(x_axis.place(point.x)), _round(y_axis.place(point.y))
    dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="4"><title>{}</title></circle>').format(
        point.style, x, y, point.title
    )
    return _marked(point, dot)


def _marked(point: _Point, drawn: Markup) -> Markup:
    return Markup('<g class="{}">{}</g>').format(point.mark, drawn) if point.mark else drawn


_Box = tuple[float, float, float, float]


def _names(points: Sequence[tuple[float, float, _Point]], others: Sequence[tuple[float, float, str]]) -> list[Markup]:
    """Row and model next to each point, in the first free place of eight; the row alone where no name fits, or neither.

    Then the reference's models at theirs, where room is left.
    """
    dots = [(x - 4, y - 4, x + 4, y + 4) for x, y, _ in points] + [(x - 3, y - 3, x + 3, y + 3) for x, y, _ in others]
    boxes: dict[int, _Box] = {}
    parts: dict[int, Markup] = {}
    # every row has its number before any has its name
    for named in (False, True):
        for x, y, point in points:
            text = f"{point.number} {point.name}" if named else str(point.number)
            taken = [*dots, *(box for number, box in boxes.items() if number != point.number)]
            if (box := _free(x, y, text, taken)) is not None:
                boxes[point.number], parts[point.number] = box, _marked(point, _text(box, "number", text))
    found, taken = list(parts.values()), [*dots, *boxes.values()]
    for x, y, name in others:
        if name and (box := _free(x, y, name, taken)) is not None:
            taken.append(box)
            found.append(_text(box, "paper-name", name))
    return found


def _text(box: _Box, kind: str, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _round(box[0]), _round(box[3]), text)


def _free(x: float, y: float, text: str, taken: Sequence[_Box]) -> _Box | None:
    """A free place for a text next to a point; None where all eight are taken."""
    wide = DIGIT * len(text)
    sides = ((6, -6), (6, 4), (-6 - wide, -6), (-6 - wide, 4), (-wide / 2, -11), (-wide / 2, 6), (13, -3))
    for dx, dy in (*sides, (-13 - wide, -3)):
        box = (x + dx, y + dy - 1, x + dx + wide, y + dy + LINE - 2)
        inside = box[0] >= LEFT - 2 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= BOTTOM + 2
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _round(value: float) -> float:
    return round(value, 1)


def _log_axis(values: Sequence[float], *, reverse: bool) -> _Axis:
    """A log axis over the values, with 3 to 7 ticks of 1, 2, 3, 5 times powers of ten."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.08 * (high - low), 0.06)
    low, high = low - room, high + room

    def place(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * (1 - share if reverse else share)

    powers = range(math.floor(low), math.ceil(high) + 1)
    steps: list[float] = []
    for factors in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
    ):
        steps = [10.0**power * factor for power in powers for factor in factors]
        steps = [step for step in steps if low <= math.log10(step) <= high]
        if len(steps) >= 3:
            break
    return _Axis(place, tuple((step, short(step)) for step in steps[:: -(-len(steps) // 7) or 1]))


def _count_axis(top: float) -> _Axis:
    """Numbers of features from 0: linear up to LINEAR_UP_TO, logarithmic in 1 + n beyond."""
    height = BOTTOM - TOP
    if top > LINEAR_UP_TO:
        end = math.log10(1 + top) * 1.06
        ticks = [0.0, *(10.0**power * factor for power in range(7) for factor in ((1, 3) if top < 1000 else (1,)))]
        return _Axis(
            lambda value: BOTTOM - height * math.log10(1 + value) / end,
            tuple((tick, short(tick)) for tick in ticks if tick <= top * 1.1),
        )
    end = max(top * 1.08, 1.0)
    step = next(step for step in (1, 2, 5, 10, 20) if end / step <= 6)
    return _Axis(lambda value: BOTTOM - height * value / end, tuple((n, str(n)) for n in range(0, int(end) + 1, step)))


def _share_axis() -> _Axis:
    height = BOTTOM - TOP
    return _Axis(
        lambda value: BOTTOM - height * value / 1.04,
        tuple((share, percent(share)) for share in (0, 0.25, 0.5, 0.75, 1.0)),
    )


def short(value: float) -> str:
    """A count for an axis or a narrow column: 135M, 1.5B, 12."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
