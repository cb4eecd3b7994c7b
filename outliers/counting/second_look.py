"""A second read of a float32 capture at resid: the exact values that the 16-bit histogram puts into one bin.

Whether a value is massive depends on the median of its layer, and a histogram of float32 values rounded to bfloat16 gives the
median only to 0.4%. So the values in the bins near the median, and near 1,000 times the median, are counted by their bits. A
part of a corpus does not know the median of the whole: it counts more bins on both sides, and merged counts hold for the bins
that all parts have counted. If that is not enough, the median is only bounded, and `massive` reports it.
A corpus whose windows are counted and freed is read once as a part whose bins narrow (`narrow`); where its end shows that other
bins are needed, it is read again (`settle`). Knows chunks and counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.bits import bits_to_float, float_to_bits
from outliers.counting.summary import ALL_BINS, FINE, LAST_BIN, MASSIVE_MAGNITUDE, MASSIVE_RATIO, Summary, add_up
from outliers.store.chunks import ChunkFiles
from outliers.study.layout import Layout

PART_VALUES = 100_000
"""Distinct values near the median that a part of a corpus keeps for a layer, 1.6 MB: shards of a small study share all bins,
shards of a large study have medians that are one or two bins apart."""
LEAST_BINS = 1
"""Bins on both sides of the median that a part always keeps."""
ROLLING_VALUES, ROLLING_BINS = 3 * PART_VALUES, 4
"""The same while a corpus rolls by: its median may move that far, by 1.6%, before the corpus is read again. At most 9 bins and
9.4 MB a layer are full."""
BIN_VALUES = 1 << 16
"""Distinct magnitudes that round to one bfloat16."""
ROW_BYTES = 1_000_000
PENDING_VALUES = 1_000_000
"""Values that are held before they are added up."""


def bin_of(bits: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The bin of magnitudes, as float32 bits without sign: bfloat16, ties to even, larger ones are in the largest finite bin."""
    rounded = (bits.astype(np.int64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    found: NDArray[np.int64] = np.minimum(rounded, LAST_BIN)
    return found


def bin_ends(first: int, last: int) -> tuple[float, float]:
    """The least and the greatest float32 that round to a bin of first...last."""
    low = max(0, (first << 16) - 0x8000 + (first & 1))
    high = (last << 16) + 0x8000 - (last & 1) if last < LAST_BIN else 0x7F7F_FFFF
    ends = bits_to_float(np.array([low, high], np.uint32), "float32")
    return float(ends[0]), float(ends[1])


def magnitude_bins(histogram: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts by magnitude, (32768,): a histogram's patterns of both signs together."""
    return histogram[:0x8000] + histogram[0x8000:]


def window_bits(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least and the greatest magnitude of windows of bins, (L, 2, 2), as float32 bits without sign; (1, 0) where empty."""
    limits = np.tile(np.array([1, 0], np.int64), (*windows.shape[:-1], 1))
    for place in np.argwhere(windows[..., 0] <= windows[..., 1]).tolist():
        first, last = windows[tuple(place)].tolist()
        limits[tuple(place)] = float_to_bits(np.array(bin_ends(first, last), np.float32), "float32")
    return limits


def middle_bins(bins: NDArray[np.int64]) -> tuple[int, int] | None:
    """The bins of the two middle magnitudes; None if there are no values."""
    upto = np.cumsum(bins)
    total = int(upto[-1])
    if not total:
        return None
    low, high = (int(np.searchsorted(upto, rank, side="right")) for rank in ((total - 1) // 2, total // 2))
    return low, high


def windows_of(
    bins: NDArray[np.int64], *, part: bool, values: int = PART_VALUES, least: int = LEAST_BINS
) -> NDArray[np.int64]:
    """(2, 2): first and last bin near the median, and near 1,000 times the median; (1, 0) is an empty window.

    values, least: of a part, see PART_VALUES and LEAST_BINS.
    """
    windows = np.array([[1, 0], [1, 0]], np.int64)
    middle = middle_bins(bins)
    if middle is None:
        return np.array(ALL_BINS, np.int64)
    first, last = middle
    if part:
        first, last = _widened(bins, first, last, values, least)
    windows[0] = first, last
    low, high = (MASSIVE_RATIO * end for end in bin_ends(first, last))
    if high > MASSIVE_MAGNITUDE:
        most = float(np.finfo(np.float32).max)
        ends = np.array([min(most, max(low, MASSIVE_MAGNITUDE)), min(most, high)]).astype(np.float32)
        windows[1] = bin_of(float_to_bits(ends, "float32").astype(np.uint32))
    return windows


def _widened(bins: NDArray[np.int64], first: int, last: int, values: int, least: int) -> tuple[int, int]:
    """Add bins on both sides: `least` always, more while they hold at most `values` distinct values."""
    held = int(np.minimum(bins[first : last + 1], BIN_VALUES).sum())
    for step in range(LAST_BIN):
        low, high = max(0, first - 1), min(LAST_BIN, last + 1)
        held += sum(min(int(bins[end]), BIN_VALUES) for end in {low, high} - {first, last})
        if (low, high) == (first, last) or (step >= least and held > values):
            break
        first, last = low, high
    return first, last


def look_again(
    summary: Summary,
    files: ChunkFiles,
    layout: Layout,
    lines: Mapping[int, Mapping[str, Any]],
    lengths: Sequence[int],
    workers: int,
) -> None:
    """Fill `fine` and `fine_windows` of a Summary of float32 values with resid; other Summaries stay unchanged.

    lines: sequence -> its line of the journal. lengths: tokens of each sequence of the summary. For a whole corpus only layers
    with a value above 100 are read, for a part of a corpus all layers. Raises CorruptCapture.
    """
    if not needs_look(summary):
        return
    summary.fine_windows[:] = needed_windows(summary, part=summary.sequences.size < layout.num_sequences)
    summary.fine = np.zeros(0, FINE)
    look_at(summary, summary.sequences.tolist(), files, layout, lines, lengths, workers)


def needs_look(summary: Summary) -> bool:
    """Whether the values are read a second time: float32 ones with resid among them."""
    return "resid" in summary.sites and summary.frame.dtype == "float32"


def needed_windows(summary: Summary, *, part: bool) -> NDArray[np.int64]:
    """(L, 2, 2): the bins whose values are counted, of a part of a corpus in all layers, else where a value is above 100."""
    windows = np.tile(np.array([[1, 0], [1, 0]], np.int64), (summary.frame.num_layers, 1, 1))
    for layer in range(summary.frame.num_layers):
        if part or summary.massive_cells[layer]:
            windows[layer] = windows_of(magnitude_bins(summary.sites["resid"].histogram[layer]), part=part)
    return windows


def look_at(
    summary: Summary,
    sequences: Sequence[int],
    files: ChunkFiles,
    layout: Layout,
    lines: Mapping[int, Mapping[str, Any]],
    lengths: Sequence[int],
    workers: int,
) -> None:
    """Add the values of some sequences that lie in `fine_windows` to `fine`. Arguments as `look_again`. Raises CorruptCapture."""
    windows = summary.fine_windows
    chosen = np.flatnonzero((windows[..., 0] <= windows[..., 1]).any(axis=1)).tolist()

    def read(layer: int) -> NDArray[Any]:
        return _read_layer(windows[layer], sequences, files, layout, lines, lengths, layer)

    with ThreadPoolExecutor(workers, thread_name_prefix="second-look") as pool:
        found = list(pool.map(read, chosen))
    summary.fine = add_up(np.concatenate([summary.fine, *found]))


def narrow(summary: Summary) -> None:
    """Leave out of `fine` and `fine_windows` the bins that are far from the median so far."""
    for layer in range(summary.frame.num_layers):
        bins = magnitude_bins(summary.sites["resid"].histogram[layer])
        wide = windows_of(bins, part=True, values=ROLLING_VALUES, least=ROLLING_BINS)
        own = summary.fine_windows[layer]
        own[:, 0] = np.maximum(own[:, 0], wide[:, 0])
        own[:, 1] = np.minimum(own[:, 1], wide[:, 1])
    _leave_out(summary)


def settle(summary: Summary, *, part: bool) -> bool:
    """Leave what `look_again` would have counted of the same sequences. Where bins of it were not counted: False, and
    `fine_windows` are those to count, from nothing, in a second read of all sequences."""
    needed, held = needed_windows(summary, part=part), summary.fine_windows
    empty = needed[..., 0] > needed[..., 1]
    inside = (held[..., 0] <= needed[..., 0]) & (needed[..., 1] <= held[..., 1])
    summary.fine_windows = needed
    if not (empty | inside).all():
        summary.fine = np.zeros(0, FINE)
        return False
    _leave_out(summary)
    return True


def _leave_out(summary: Summary) -> None:
    """Keep of `fine` what is in `fine_windows`."""
    bins, layers = bin_of(summary.fine["bits"]), summary.fine["layer"]
    own = summary.fine_windows[layers]  # (value, 2, 2)
    inside = (own[..., 0] <= bins[:, None]) & (bins[:, None] <= own[..., 1])
    summary.fine = summary.fine[inside.any(axis=1)]


def _read_layer(
    windows: NDArray[np.int64],
    sequences: Sequence[int],
    files: ChunkFiles,
    layout: Layout,
    lines: Mapping[int, Mapping[str, Any]],
    lengths: Sequence[int],
    layer: int,
) -> NDArray[Any]:
    """The values in the windows of one layer, (2, 2), as FINE."""
    site, width = layout.aliases.get("resid", "resid"), layout.widths["resid"]
    rows = max(1, min(layout.chunk_positions, ROW_BYTES // (width * layout.itemsize)))
    buffer = np.empty((rows, width), np.dtype("<u4"))
    total, pending, held = np.zeros(0, FINE), [], 0
    for sequence, tokens in zip(sequences, lengths, strict=True):
        chunks = layout.chunks_of(int(tokens))
        for chunk in range(chunks):
            left = min(layout.span(chunk).stop, int(tokens)) - layout.span(chunk).start
            crc = int(lines[sequence]["crc32"][site][layer * chunks + chunk])
            for run in files.tiles(site, layer, sequence, chunk, crc, buffer):
                if left > 0:
                    pending.append(_chosen(run[:left], windows))
                    held += pending[-1].size
                left -= run.shape[0]
            if held > PENDING_VALUES:
                total, pending, held = _added(total, pending, layer), [], 0
    return _added(total, pending, layer)


def _chosen(run: NDArray[np.uint32], windows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Bits without sign of the values of a run that lie in a window."""
    bits = run.ravel() & np.uint32(0x7FFF_FFFF)
    kept = np.zeros(bits.shape, np.bool_)
    for first, last in windows.tolist():
        if first <= last:
            low, high = (float_to_bits(np.array([end], np.float32), "float32")[0] for end in bin_ends(first, last))
            kept |= (bits >= low) & (bits <= high)  # infinity and NaN are above every end
    return bits[kept]


def _added(total: NDArray[Any], pending: list[NDArray[np.uint32]], layer: int) -> NDArray[Any]:
    bits, counts = np.unique(np.concatenate([np.zeros(0, np.uint32), *pending]), return_counts=True)
    own = np.zeros(bits.size, FINE)
    own["layer"], own["bits"], own["count"] = layer, bits, counts
    return add_up(np.concatenate([total, own]))
