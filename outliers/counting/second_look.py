"""A second read of a float32 capture at resid: the exact values that the 16-bit histogram puts into one bin.

Whether a value is massive depends on the median of its layer, and a histogram of float32 values rounded to bfloat16 gives the
median only to 0.4%. So the values in the bins near the median, and near 1,000 times the median, are counted by their bits. A
part of a corpus does not know the median of the whole: it counts more bins on both sides, and merged counts hold for the bins
that all parts have counted. If that is not enough, the median is only bounded, and `massive` reports it.
Knows chunks and counts.
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


def middle_bins(bins: NDArray[np.int64]) -> tuple[int, int] | None:
    """The bins of the two middle magnitudes; None if there are no values."""
    upto = np.cumsum(bins)
    total = int(upto[-1])
    if not total:
        return None
    low, high = (int(np.searchsorted(upto, rank, side="right")) for rank in ((total - 1) // 2, total // 2))
    return low, high


def windows_of(bins: NDArray[np.int64], *, part: bool) -> NDArray[np.int64]:
    """(2, 2): first and last bin near the median, and near 1,000 times the median; (1, 0) is an empty window."""
    windows = np.array([[1, 0], [1, 0]], np.int64)
    middle = middle_bins(bins)
    if middle is None:
        return np.array(ALL_BINS, np.int64)
    first, last = middle
    if part:
        first, last = _widened(bins, first, last)
    windows[0] = first, last
    low, high = (MASSIVE_RATIO * end for end in bin_ends(first, last))
    if high > MASSIVE_MAGNITUDE:
        most = float(np.finfo(np.float32).max)
        ends = np.array([min(most, max(low, MASSIVE_MAGNITUDE)), min(most, high)]).astype(np.float32)
        windows[1] = bin_of(float_to_bits(ends, "float32").astype(np.uint32))
    return windows


def _widened(bins: NDArray[np.int64], first: int, last: int) -> tuple[int, int]:
    """Add bins on both sides: LEAST_BINS always, more while they hold at most PART_VALUES distinct values."""
    held = int(np.minimum(bins[first : last + 1], BIN_VALUES).sum())
    for step in range(LAST_BIN):
        low, high = max(0, first - 1), min(LAST_BIN, last + 1)
        held += sum(min(int(bins[end]), BIN_VALUES) for end in {low, high} - {first, last})
        if (low, high) == (first, last) or (step >= LEAST_BINS and held > PART_VALUES):
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
    totals = summary.sites.get("resid")
    if totals is None or summary.frame.dtype != "float32":
        return
    part = summary.sequences.size < layout.num_sequences
    summary.fine_windows[:] = (1, 0)
    chosen = [n for n in range(summary.frame.num_layers) if part or summary.massive_cells[n]]
    for layer in chosen:
        summary.fine_windows[layer] = windows_of(magnitude_bins(totals.histogram[layer]), part=part)

    def read(layer: int) -> NDArray[Any]:
        return _read_layer(summary, files, layout, lines, lengths, layer)

    with ThreadPoolExecutor(workers, thread_name_prefix="second-look") as pool:
        found = list(pool.map(read, chosen))
    summary.fine = np.concatenate([np.zeros(0, FINE), *found])


def _read_layer(
    summary: Summary,
    files: ChunkFiles,
    layout: Layout,
    lines: Mapping[int, Mapping[str, Any]],
    lengths: Sequence[int],
    layer: int,
) -> NDArray[Any]:
    """The values in the windows of one layer, as FINE."""
    site, width = layout.aliases.get("resid", "resid"), layout.widths["resid"]
    rows = max(1, min(layout.chunk_positions, ROW_BYTES // (width * layout.itemsize)))
    buffer = np.empty((rows, width), np.dtype("<u4"))
    total, pending, held = np.zeros(0, FINE), [], 0
    for sequence, tokens in zip(summary.sequences.tolist(), lengths, strict=True):
        chunks = layout.chunks_of(int(tokens))
        for chunk in range(chunks):
            left = min(layout.span(chunk).stop, int(tokens)) - layout.span(chunk).start
            crc = int(lines[sequence]["crc32"][site][layer * chunks + chunk])
            for run in files.tiles(site, layer, sequence, chunk, crc, buffer):
                if left > 0:
                    pending.append(_chosen(run[:left], summary.fine_windows[layer]))
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
