"""The private form of a Summary on disk: never published, only sent from a machine to the computer that merges.

    <summary>/totals.npz            the totals
    <summary>/checksums.json        every file of the summary with its checksum, written last: it marks a complete folder
    <summary>/sequences/<first>.npz counts of single sequences at the deciding magnitude, sparse, some sequences a file
    <summary>/experts.npz           of a mixture of experts the totals of its experts (`experts.totals_files`)
    <summary>/study.json            the prepared study (`prepare.Prepared`): merging refuses summaries of another study

Knows arrays and files, nothing of how they were counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.sequence_counts import SequenceCounts as SequenceCounts
from outliers.counting.summary import RESULTS, TEXT_KINDS, Frame, SiteTotals, Summary
from outliers.errors import CaptureError, CorruptCapture
from outliers.experts.totals_files import EXPERTS
from outliers.files.sealed import check_folder, seal_folder
from outliers.untrusted.npz import UNREADABLE, open_npz

MAX_LAYERS, MAX_FEATURES, MAX_MAGNITUDES = 1_024, 1 << 17, 33
"""The limits of summary.json (`results.schema`, which is not imported because it loads Arrow)."""
COUNTS = "sequences"
FORMATS = "formats"
"""Folder next to the totals with the errors of number formats (`results.format_errors`), sealed by itself."""
TOTALS = "totals.npz"
STUDY = "study.json"
BATCH_SEQUENCES = 64
BATCH_BYTES = 8_000_000
"""A file of counts is closed at the first of these limits, which bounds the number of files and the memory."""


class CountsWriter:
    """Writes the counts of sequences, given in ascending order, in files of several sequences; holds one file in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / COUNTS
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[dict[str, NDArray[Any]]] = []
        self._bytes = 0

    def add(self, counts: SequenceCounts) -> None:
        """Keep the counts of one sequence, and write a file at the limits."""
        row = _sparse(counts)
        self._rows.append(row)
        self._bytes += sum(array.nbytes for array in row.values())
        if len(self._rows) >= BATCH_SEQUENCES or self._bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the kept counts."""
        if not self._rows:
            return
        arrays: dict[str, NDArray[Any]] = {}
        for name in self._rows[0]:
            parts = [row[name] for row in self._rows]
            if "." in name and not name.endswith(".reach"):
                # (index of the sequence in this file, where..., how many) a column
                owner = np.repeat(np.arange(len(parts), dtype=np.int32), [part.shape[1] for part in parts])
                arrays[name] = np.concatenate([owner[None], np.concatenate(parts, axis=1)])
            else:
                arrays[name] = np.stack(parts)
        # numpy's types take a keyword that is any array for its own `allow_pickle`
        np.savez(self.folder / f"{int(arrays['sequence'][0])}.npz", **arrays)  # type: ignore[arg-type]
        self._rows, self._bytes = [], 0


def _sparse(counts: SequenceCounts) -> dict[str, NDArray[Any]]:
    row: dict[str, NDArray[Any]] = {
        "sequence": np.array(counts.sequence),
        "tokens": np.array(counts.tokens),
        "nll": np.array(counts.nll, np.float64),
        "nll_tokens": np.array(counts.nll_tokens),
        "legacy.hooks": _used(counts.hooks),
        "legacy.union": _used(counts.legacy_union),
    }
    for site, hits in counts.hits.items():
        layer, feature = np.nonzero(hits)
        row[f"{site}.hits"] = np.stack([layer, feature, hits[layer, feature]]).astype(np.int32)
        row[f"{site}.union"] = _used(counts.union[site])
    return row | {f"{site}.reach": reach for site, reach in counts.reach.items()}


def _used(values: NDArray[np.int64]) -> NDArray[np.int32]:
    used = np.flatnonzero(values)
    return np.stack([used, values[used]]).astype(np.int32)


def _dense(stored: NDArray[np.int32], width: int) -> NDArray[np.int64]:
    values = np.zeros(width, np.int64)
    values[stored[0]] = stored[1]
    return values


def read_counts(folder: Path, frame: Frame) -> Iterator[SequenceCounts]:
    """The counts of every sequence of a summary, one at a time; ascending within a file. Raises CorruptCapture."""
    for path in sorted((folder / COUNTS).glob("*.npz"), key=lambda p: int(p.stem)):
        try:
            with open_npz(path) as stored:
                arrays = dict(stored)
        except UNREADABLE as error:
            raise CorruptCapture(f"{path} can't be read: {error}; analyze again") from error
        for index in range(arrays["sequence"].size):
            yield _one(arrays, index, frame)


def _one(arrays: dict[str, NDArray[Any]], index: int, frame: Frame) -> SequenceCounts:
    def own(name: str) -> NDArray[np.int32]:
        owner = arrays[name][0]
        first, last = np.searchsorted(owner, [index, index + 1])
        return arrays[name][1:, first:last]

    hits, union = {}, {}
    for site in frame.sites:
        layer, feature, count = own(f"{site}.hits")
        hits[site] = np.zeros((frame.num_layers, frame.width(site)), np.int64)
        hits[site][layer, feature] = count
        union[site] = _dense(own(f"{site}.union"), frame.width(site))
    return SequenceCounts(
        sequence=int(arrays["sequence"][index]),
        tokens=int(arrays["tokens"][index]),
        hits=hits,
        union=union,
        hooks=_dense(own("legacy.hooks"), frame.block_width),
        legacy_union=_dense(own("legacy.union"), frame.block_width),
        reach={site: arrays[f"{site}.reach"][index] for site in frame.captured},
        nll=float(arrays["nll"][index]),
        nll_tokens=int(arrays["nll_tokens"][index]),
    )


_WHOLE = (*(name for name in RESULTS if name != "kind_tokens"), "fine", "fine_windows")


def write_summary(folder: Path, summary: Summary) -> None:
    """Write the totals, and last the checksums of all files."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(summary, name) for name in _WHOLE}
    arrays["tokens"] = np.array(summary.tokens)
    if summary.kind_tokens is not None:
        arrays["kind_tokens"] = summary.kind_tokens
    arrays["frame"] = np.array(json.dumps(summary.frame.__dict__))
    for site, totals in summary.sites.items():
        arrays |= {f"{site}.{name}": value for name, value in totals.__dict__.items() if name != "histogram"}
        # few patterns are used
        layer, pattern = np.nonzero(totals.histogram)
        arrays[f"{site}.histogram"] = np.stack([layer, pattern, totals.histogram[layer, pattern]])
    temporary = folder / ".totals.npz"
    np.savez(temporary, **arrays)  # type: ignore[arg-type]  # as above
    temporary.replace(folder / TOTALS)
    counts = sorted(f"{COUNTS}/{path.name}" for path in (folder / COUNTS).glob("*.npz"))
    others = [name for name in (STUDY, EXPERTS) if (folder / name).exists()]
    seal_folder(folder, (TOTALS, *others, *counts))


def has_summary(folder: Path) -> bool:
    """Whether there is a complete summary, with every file as it was written."""
    return (folder / TOTALS).exists() and check_folder(folder)


def read_summary(folder: Path) -> Summary:
    """The Summary in `folder`. Raises CaptureError if there is none, CorruptCapture if it can't be read."""
    path = folder / TOTALS
    if not path.exists():
        raise CaptureError(f"there is no summary in {folder}: analyze first")
    if not check_folder(folder):
        raise CorruptCapture(f"the summary in {folder} is not what was written there: analyze again")
    try:
        with open_npz(path) as stored:
            raw = json.loads(str(stored["frame"]))
            widths = tuple((str(site), int(width)) for site, width in raw["widths"])
            frame = Frame(**(raw | {"widths": widths, "ladder": tuple(raw["ladder"])}))
            _check_frame(frame, stored)
            summary = Summary.zero(frame)
            for site, totals in summary.sites.items():
                for name in SiteTotals.__dataclass_fields__:
                    if name != "histogram":
                        setattr(totals, name, stored[f"{site}.{name}"])
                layer, pattern, count = stored[f"{site}.histogram"]
                totals.histogram[layer, pattern] = count
            for name in _WHOLE:
                setattr(summary, name, stored[name])
            summary.kind_tokens = _kind_tokens(frame, stored)
            summary.tokens = int(stored["tokens"])
            return summary
    except UNREADABLE as error:
        raise CorruptCapture(f"{path} can't be read: {error}; analyze again") from error


def _check_frame(frame: Frame, stored: Any) -> None:
    """Raise ValueError if the frame does not match the arrays: the memory of a Summary follows from its frame."""
    layers, widths = frame.num_layers, dict(frame.widths)
    known = 1 <= layers <= MAX_LAYERS and 1 <= len(frame.ladder) <= MAX_MAGNITUDES and 1 <= frame.positions < 1 << 31
    if not known or not widths or not all(1 <= width <= MAX_FEATURES for width in widths.values()):
        raise ValueError(f"its frame is of {layers} layers, the widths {widths} and {len(frame.ladder)} magnitudes")
    for site in frame.sites:
        wanted = (len(frame.ladder), layers, frame.width(site))
        if stored[f"{site}.hits"].shape != wanted:
            raise ValueError(f"its frame has {wanted} counts at {site}, its arrays {stored[f'{site}.hits'].shape}")


def _kind_tokens(frame: Frame, stored: Any) -> NDArray[np.int64] | None:
    """Tokens by kind; None in summaries that were written before they were counted. ValueError for another shape."""
    if "kind_tokens" not in stored:
        return None
    found: NDArray[np.int64] = stored["kind_tokens"]
    wanted = (len(TEXT_KINDS), frame.width(frame.site))
    if found.shape != wanted:
        raise ValueError(f"it has tokens of {wanted} kinds and features, its arrays {found.shape}")
    return found
