"""Pictures with tokens on their axis: positions in the sequence, kinds of tokens, the largest massive activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from outliers.report.content import Content
from outliers.report.figures import (
    INK,
    SITE_COLOURS,
    Plot,
    criterion,
    dress,
    entitle,
    finish,
    legend,
    look,
    new_figure,
    number,
    percent,
    pt,
)
from outliers.report.kinds import KIND_WORDS, OTHER_WORD, kind_rows
from outliers.results.schema import MassiveFeature, MassiveRow, StudySummary, TokenFeature, Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POSITION_ROWS = 10
MAX_KIND_ROWS = 10
MASSIVE_RULE = "abs(x) > 100 and at least 1,000 times the median magnitude"
MAX_SURFACE_TOKENS = 16
MAX_SURFACE_FEATURES = 6
KIND_COLOURS = ("#b4232c", "#e08214", "#009e73", "#0072b2", "#8fc1e3", "#b9c0c9")


def positions(summary: StudySummary, tokens: Tokens) -> Plot | None:
    """Where in a sequence the systematic features are hit, a row a feature; None without one."""
    return _position_rows(summary, tokens.features, "positions.png", ("hits", criterion(summary.criteria)))


def massive_positions(summary: StudySummary, tokens: Tokens) -> Plot | None:
    """Where in a sequence massive activations sit, a row a feature; None without one."""
    words = ("massive activations", f"at resid: {MASSIVE_RULE} of the layer")
    return _position_rows(summary, tokens.massive_features, "massive_positions.png", words)


def _position_rows(
    summary: StudySummary, rows: Sequence[TokenFeature | MassiveFeature], name: str, words: tuple[str, str]
) -> Plot | None:
    """words: what sits there, and the subtitle."""
    shown = [row for row in rows if any(row.positions.counts)][:MAX_POSITION_ROWS]
    if not shown:
        return None
    what, below = words
    figure = new_figure(1.6 + 0.55 * max(len(shown), 2))
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(grid, shown, strict=True):
        _position_row(axes, row, summary)
    bin_tokens = shown[0].positions.bin_tokens
    unit = "0-based" if bin_tokens == 1 else f"0-based, {bin_tokens} a bar"
    grid[-1].set_xlabel(f"position in the sequence ({unit})", fontsize=pt(9.5), color=INK)
    figure.supylabel("feature", fontsize=pt(9.5), color=INK)
    share = "of tokens at the position" if _whole_sequences(summary) else "of the feature's tokens"
    _right_label(figure, f"% {share}")
    entitle(figure, grid[0], summary.model.id, f"where {what} sit", below)
    features = ", ".join(str(row.feature) for row in shown)
    return finish(name, f"Positions of {what} for features {features}, as shares {share}.", figure)


def _right_label(figure: Figure, text: str) -> None:
    """A label of the right axes of all rows, in a margin that the layout leaves free."""
    margin = pt(16) / 72 / figure.get_figwidth()
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1 - margin, 1))
    written = figure.text(
        1 - margin / 2, 0.5, text, rotation=270, ha="center", va="center", fontsize=pt(8.5), color=INK
    )
    written.set_in_layout(False)


def _whole_sequences(summary: StudySummary) -> bool:
    """Whether every sequence has every position, so that the tokens of each position are known."""
    corpus = summary.corpus
    return corpus.num_tokens == corpus.num_sequences * corpus.sequence_length


def position_shares(summary: StudySummary, row: TokenFeature | MassiveFeature) -> list[float]:
    """Of each bin, the tokens in per cent: of all tokens there, or, where sequences differ in length, of the feature's own."""
    counts, width, length = row.positions.counts, row.positions.bin_tokens, summary.corpus.sequence_length
    if _whole_sequences(summary):
        there = [
            min(width, max(length - start * width, 1)) * summary.corpus.num_sequences for start in range(len(counts))
        ]
    else:
        there = [max(sum(counts), 1)] * len(counts)
    return [100 * count / tokens for count, tokens in zip(counts, there, strict=True)]


def _position_row(axes: Axes, row: TokenFeature | MassiveFeature, summary: StudySummary) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shares = position_shares(summary, row)
    edges = np.arange(len(shares) + 1) * row.positions.bin_tokens
    dress(axes, "", "")
    axes.stairs(shares, edges, fill=True, color=SITE_COLOURS["attn_in"])
    axes.set(xlim=(0, max(1, min(edges[-1], summary.corpus.sequence_length))), ylim=(0, max(shares) * 1.08))
    label: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 10}
    axes.set_ylabel(str(row.feature), fontsize=pt(9.5), fontweight="bold", color=INK, **label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=2, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}%"))
    axes.yaxis.tick_right()


def kinds(content: Content) -> Plot | None:
    """The kinds of the tokens with a hit, a bar a systematic feature, below that of all tokens; None where not counted."""
    found = None if content.pictures is None else content.pictures.kinds
    if found is None or not found.features:
        return None
    rows = kind_rows(found)[: MAX_KIND_ROWS + 1]
    figure = new_figure(1.35 + 0.3 * len(rows))
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for index, (word, colour) in enumerate(zip((*KIND_WORDS.values(), OTHER_WORD), KIND_COLOURS, strict=True)):
        shares = np.array([100 * counts[index] / max(tokens, 1) for _, tokens, counts in rows])
        axes.barh(range(len(rows)), shares, left=left, height=0.7, color=colour, label=word)
        left += shares
    axes.set_yticks(
        range(len(rows)), [name if index == 0 else f"feature {name}" for index, (name, _, _) in enumerate(rows)]
    )
    axes.invert_yaxis()
    dress(axes, "tokens with a hit in any layer, by kind (%)", "")
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")
    axes.axhline(0.5, color=INK, linewidth=1.0)
    legend(axes)
    entitle(figure, axes, content.summary.model.id, "on which tokens", criterion(content.summary.criteria))
    first = rows[1]
    said = ", ".join(
        f"{percent(count / max(first[1], 1))} {word}"
        for word, count in zip((*KIND_WORDS.values(), OTHER_WORD), first[2], strict=True)
        if count
    )
    return finish(
        "kinds.png", f"Bars of kinds of tokens for {len(rows) - 1} features. Feature {first[0]}: {said}.", figure
    )


def massive_surface(summary: StudySummary) -> Plot | None:
    """Bars over tokens and features of the listed massive activations of the layer with the largest; None without one."""
    if not summary.massive:
        return None
    layer = max(summary.massive, key=lambda row: (abs(row.value), -row.layer)).layer
    rows = [row for row in summary.massive if row.layer == layer]
    rows.sort(key=lambda row: (-abs(row.value), row.sequence, row.position, row.feature))
    features = sorted(list(dict.fromkeys(row.feature for row in rows))[:MAX_SURFACE_FEATURES])
    places = sorted(list(dict.fromkeys((row.sequence, row.position) for row in rows))[:MAX_SURFACE_TOKENS])
    shown = [row for row in rows if row.feature in features and (row.sequence, row.position) in places]
    figure = new_figure(3.9 if look().narrow else 4.6)
    axes: Any = figure.add_subplot(projection="3d")
    _bars_3d(axes, shown, features, places)
    names = {(row.sequence, row.position): _token_name(row) for row in shown}
    axes.set_xticks(range(len(places)), [names[place] for place in places], rotation=60, ha="right", va="center")
    axes.set_yticks(range(len(features)), [str(feature) for feature in features])
    axes.set_zlabel("abs(x) (no unit)", fontsize=pt(9), color=INK, labelpad=pt(3 if look().narrow else 8))
    axes.set_ylabel("feature", fontsize=pt(9), color=INK, labelpad=pt(6))
    axes.zaxis.set_major_formatter(lambda value, _: number(value))
    axes.tick_params(labelsize=pt(7.5), colors=INK, pad=pt(1))
    below = f"at resid of layer {layer}, the {len(shown)} largest of {len(rows):,} listed there"
    # constrained layout takes the box of a solid for flat and leaves half of the figure empty
    figure.set_layout_engine("none")
    axes.set_position((0.02, 0.09, 0.94, 0.82) if look().titled else (0.03, 0.08, 0.75, 0.95))
    entitle(figure, None, summary.model.id, "massive activations", below)
    peak = shown[0]
    return finish(
        "massive_surface.png",
        f"Bars over {len(places)} tokens and {len(features)} features of layer {layer}: the largest massive activation is "
        f"{number(peak.value)}, in feature {peak.feature} at position {peak.position} of sequence {peak.sequence}.",
        figure,
    )


def _bars_3d(axes: Any, rows: Sequence[MassiveRow], features: list[int], places: list[tuple[int, int]]) -> None:
    """A bar for each row on a grey floor; the features differ in colour, the furthest are drawn first."""
    width = 0.6
    top = max(abs(row.value) for row in rows)
    for row in sorted(rows, key=lambda row: (-features.index(row.feature), (row.sequence, row.position))):
        x, y = places.index((row.sequence, row.position)), features.index(row.feature)
        colour = KIND_COLOURS[(3, 1, 2, 0, 4, 5)[y % 6]]
        axes.bar3d(
            x - width / 2, y - width / 2, 0, width, width, abs(row.value), color=colour, shade=True, clip_on=False
        )
    axes.set(xlim=(-0.7, len(places) - 0.3), ylim=(-0.7, max(len(features), 2) - 0.3), zlim=(0, top * 1.05))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_edgecolor("#d5d9de")
        axis.pane.set_facecolor("#ffffff")
    axes.zaxis.pane.set_facecolor("#d9dee4")  # the floor: what is no massive activation
    axes.view_init(elev=24, azim=-62)
    axes.set_box_aspect((2.1, 1.0, 0.95), zoom=1.0 if look().narrow else 1.3)


def _token_name(row: MassiveRow) -> str:
    """The token where its text is shown and the font has it, else where it sits, as sequence:position."""
    text = row.token
    if text is None or not text or not all(" " <= char <= "~" for char in text):
        return f"{row.sequence}:{row.position}"
    return f"'{text if len(text) <= 10 else text[:9] + '~'}'".replace("$", r"\$")
