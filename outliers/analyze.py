"""A finished capture -> a Summary on disk, chunk by chunk, each chunk read once; the model is never loaded.

Sequences are dealt to an executor with the interface of `concurrent.futures` (threads by default). Memory is a few
chunks a worker and one set of totals each, whatever the size of the corpus; the sparse counts of each sequence go to
disk. Before it: `capture`. After it: `results`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import unicodedata
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.accumulate import SequenceAccumulator, SequenceCounts
from outliers.corpus import Corpus, load_corpus
from outliers.errors import CaptureError, CorruptCapture
from outliers.events import Reporter
from outliers.prepare import Prepared
from outliers.store import ChunkFiles, Journal, Layout, layout_from, read_fingerprint
from outliers.summary import Frame, SiteTotals, Summary, merge
from outliers.workspace import Workspace

GROUPS_PER_WORKER = 4
"""Sequences are dealt in this many groups a worker: few enough that totals are seldom merged, enough to share evenly."""


def frame_of(prepared: Prepared, layout: Layout) -> Frame:
    """The frame of a study's summaries."""
    criteria = prepared.spec.criteria
    return Frame(
        study_id=prepared.study_id,
        dtype=layout.dtype,
        widths=tuple(layout.widths.items()),
        num_layers=len(layout.layers),
        positions=layout.positions,
        magnitude=criteria.magnitude,
        ladder=criteria.magnitudes,
        site=prepared.site,
    )


def open_capture(folder: Path) -> tuple[Layout, Journal]:
    """Layout and journal of a complete capture; CaptureError where it isn't complete."""
    fingerprint = read_fingerprint(folder)
    if fingerprint is None:
        raise CaptureError(f"there is no capture in {folder}: extract first")
    layout, journal = layout_from(fingerprint), Journal.open(folder / "journal.jsonl")
    if len(journal.done) < layout.num_sequences:
        raise CaptureError(
            f"{folder} has {len(journal.done)} of {layout.num_sequences} sequences: extract again to finish it"
        )
    return layout, journal


def analyze(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    *,
    executor: Executor | None = None,
    workers: int | None = None,
) -> Path:
    """Summarize the capture of a study; returns the folder of its private summary.

    Raises CaptureError where the capture isn't complete, CorruptCapture where its bytes changed.
    """
    folder = workspace.capture(prepared.capture_id)
    layout, journal = open_capture(folder)
    corpus = load_corpus(prepared.corpus, workspace)
    frame = frame_of(prepared, layout)
    target = workspace.summary(prepared.capture_id, prepared.study_id)
    shutil.rmtree(target, ignore_errors=True)
    (target / "sequences").mkdir(parents=True)
    workers = workers or os.cpu_count() or 1
    groups = np.array_split(np.arange(layout.num_sequences), min(layout.num_sequences, workers * GROUPS_PER_WORKER))
    marks = delimiters(corpus)
    total = Summary.zero(frame)
    with ThreadPoolExecutor(workers) if executor is None else contextlib.nullcontext(executor) as pool:
        futures = deque(
            pool.submit(
                summarize,
                folder,
                frame,
                layout,
                {int(s): journal.done[int(s)] for s in group},
                corpus.lengths[group],
                marks[group],
                target,
            )
            for group in groups
        )
        while futures:
            # merged in the order of the groups, so that even the float moments do not depend on who was first
            total = merge(total, futures.popleft().result())
            reporter.progress("analyze", total.sequences.size, layout.num_sequences, "sequences")
    write_summary(target, total)
    return target


def summarize(
    folder: Path,
    frame: Frame,
    layout: Layout,
    entries: dict[int, dict[str, Any]],
    lengths: NDArray[np.int32],
    marks: NDArray[np.bool_],
    target: Path,
) -> Summary:
    """The Summary of the sequences in `entries` (sequence -> its journal entry).

    lengths: (sequence,), tokens that are not padding. marks: (sequence, position), delimiters. Writes each sequence's
    sparse counts below `target`/sequences.
    """
    files, summary = ChunkFiles(folder, layout), Summary.zero(frame)
    for row, (sequence, entry) in enumerate(entries.items()):
        accumulator = SequenceAccumulator(summary, sequence, marks[row])
        for chunk in range(layout.chunks_of(int(lengths[row]))):
            blocks = _layers(files, layout, sequence, chunk, entry, int(lengths[row]))
            accumulator.span(layout.span(chunk).start, blocks)
        write_counts(target / "sequences" / f"{sequence}.npz", accumulator.finish())
    return summary


def _layers(
    files: ChunkFiles, layout: Layout, sequence: int, chunk: int, entry: dict[str, Any], length: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """For each layer, {site: (position, feature)} of one chunk, without the padding after `length` tokens."""
    tokens = length - layout.span(chunk).start
    for layer in range(len(layout.layers)):
        at = layer * layout.chunks_of(length) + chunk
        read = {
            site: files.read(site, layer, sequence, chunk, entry["crc32"][site][at])[:tokens] for site in layout.stored
        }
        yield {site: read[layout.aliases.get(site, site)] for site in layout.widths}


def delimiters(corpus: Corpus) -> NDArray[np.bool_]:
    """(sequence, position) bool: tokens whose text is blank or punctuation alone."""
    marks = np.zeros(corpus.token_ids.shape, np.bool_)
    for sequence, length in enumerate(corpus.lengths):
        for position in range(int(length)):
            text = corpus.piece(sequence, position).strip()
            marks[sequence, position] = all(unicodedata.category(character).startswith("P") for character in text)
    return marks


def write_counts(path: Path, counts: SequenceCounts) -> None:
    """One sequence's counts, sparse: (layer, feature, hits) and (feature, tokens) where they are not zero."""
    arrays: dict[str, NDArray[Any]] = {"tokens": np.array(counts.tokens)}
    for site, hits in counts.hits.items():
        layer, feature = np.nonzero(hits)
        arrays[f"{site}.hits"] = np.stack([layer, feature, hits[layer, feature]]).astype(np.int32)
        arrays[f"{site}.union"] = _sparse(counts.union[site])
    arrays["legacy.hooks"], arrays["legacy.union"] = _sparse(counts.hooks), _sparse(counts.legacy_union)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _sparse(values: NDArray[np.int64]) -> NDArray[np.int32]:
    used = np.flatnonzero(values)
    return np.stack([used, values[used]]).astype(np.int32)


def _dense(stored: NDArray[np.int32], width: int) -> NDArray[np.int64]:
    values = np.zeros(width, np.int64)
    values[stored[0]] = stored[1]
    return values


def read_counts(folder: Path, frame: Frame) -> Iterator[SequenceCounts]:
    """The counts of every sequence of a summary, one at a time, in the sequences' order."""
    for path in sorted((folder / "sequences").glob("*.npz"), key=lambda p: int(p.stem)):
        with np.load(path, allow_pickle=False) as stored:
            hits, union = {}, {}
            for site in frame.sites:
                layer, feature, count = stored[f"{site}.hits"]
                hits[site] = np.zeros((frame.num_layers, frame.width(site)), np.int64)
                hits[site][layer, feature] = count
                union[site] = _dense(stored[f"{site}.union"], frame.width(site))
            width = frame.width("block") if "block" in frame.sites else 0
            yield SequenceCounts(
                sequence=int(path.stem),
                tokens=int(stored["tokens"]),
                hits=hits,
                union=union,
                hooks=_dense(stored["legacy.hooks"], width),
                legacy_union=_dense(stored["legacy.union"], width),
            )


_WHOLE = ("sequences", "position_tokens", "first_tokens", "delimiter_tokens", "top", "massive", "massive_cells")


def write_summary(folder: Path, summary: Summary) -> None:
    """Write the totals; they appear last and whole, so a folder with them is a finished summary."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(summary, name) for name in _WHOLE}
    arrays["tokens"] = np.array(summary.tokens)
    arrays["frame"] = np.array(json.dumps(summary.frame.__dict__))
    for site, totals in summary.sites.items():
        arrays |= {f"{site}.{name}": value for name, value in totals.__dict__.items()}
    temporary = folder / ".totals.npz"
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(folder / "totals.npz")


def read_summary(folder: Path) -> Summary:
    """The Summary in `folder`. Raises CaptureError where there is none, CorruptCapture where it can't be read."""
    path = folder / "totals.npz"
    if not path.exists():
        raise CaptureError(f"there is no summary in {folder}: analyze first")
    try:
        with np.load(path, allow_pickle=False) as stored:
            raw = json.loads(str(stored["frame"]))
            widths = tuple((str(site), int(width)) for site, width in raw["widths"])
            frame = Frame(**(raw | {"widths": widths, "ladder": tuple(raw["ladder"])}))
            names = SiteTotals.__dataclass_fields__
            sites = {site: SiteTotals(**{name: stored[f"{site}.{name}"] for name in names}) for site in frame.sites}
            whole = {name: stored[name] for name in _WHOLE}
            return Summary(frame=frame, tokens=int(stored["tokens"]), sites=sites, **whole)
    except (ValueError, KeyError, OSError) as error:
        raise CorruptCapture(f"{path} can't be read: {error}; analyze again") from error
