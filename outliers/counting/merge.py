"""Merges summaries of disjoint sequences of one study, counted on several machines, into the exact whole.

    machine A: python -m outliers extract study.json --sequences 0:8      then analyze, the same
    machine B: python -m outliers extract study.json --sequences 8:16     then analyze, the same
    here:      outliers merge A/summary B/summary

Only the folder of a summary (`summary_files`), a few megabytes, is sent; the activations stay on their machine. Nothing is
counted again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from outliers.counting.summary import Summary, merge
from outliers.counting.summary_files import COUNTS, STUDY, TOTALS, read_summary, write_summary
from outliers.errors import BadInput, CorruptCapture, SummaryMismatch
from outliers.experts.totals_files import has_totals, read_totals, write_totals
from outliers.files.sealed import check_folder
from outliers.locks import locked
from outliers.study.parts import LOCKS
from outliers.study.prepare import Prepared
from outliers.units import format_ranges
from outliers.untrusted.npz import UNREADABLE, open_npz
from outliers.workspace import Workspace

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Merged:
    """A merged study: the folder of its summary, the sequences in it, and the missing ones."""

    prepared: Prepared
    folder: Path
    sequences: tuple[int, ...]
    missing: tuple[int, ...]


def merge_summaries(folders: list[Path], workspace: Workspace) -> Merged:
    """Join summaries into the workspace's summary of their study.

    Raises BadInput for a folder without a summary, SummaryMismatch for a summary of another study (with the difference) or
    with a sequence that another summary has, CorruptCapture. Waits while another process merges this study here.
    """
    if not folders:
        raise BadInput("there is nothing to merge: give the folders of summaries")
    studies = [_study(folder) for folder in folders]
    for folder, other in zip(folders[1:], studies[1:], strict=True):
        if other.study_id != studies[0].study_id:
            raise SummaryMismatch(
                f"{folder} is of another study than {folders[0]}: {difference(studies[0], other)}; summaries of one study alone "
                "can be merged"
            )
    prepared = studies[0]
    with locked(workspace.root / LOCKS / f"{prepared.study_id}-summary", lambda: time.sleep(POLL_SECONDS)):
        return _merge(prepared, folders, workspace.summary(prepared.capture_id, prepared.study_id))


def _merge(prepared: Prepared, folders: list[Path], target: Path) -> Merged:
    target.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=target.parent, prefix=".merging-"))
    try:
        total = _join(folders, own)
        (own / STUDY).write_text(prepared.model_dump_json())
        _join_experts(folders, own)
        write_summary(own, total)
        # one of the summaries may be the workspace's own: it goes once the whole is there
        shutil.rmtree(target, ignore_errors=True)
        own.rename(target)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    have = tuple(total.sequences.tolist())
    missing = sorted(set(range(prepared.corpus.num_sequences)) - set(have))
    return Merged(prepared, target, have, tuple(missing))


def _study(folder: Path) -> Prepared:
    if not (folder / TOTALS).exists():
        raise BadInput(
            f"{folder} holds no summary: give a folder that `python -m outliers analyze` wrote, with totals.npz in it"
        )
    if not check_folder(folder):
        raise CorruptCapture(f"the summary in {folder} is not what was written there: analyze those sequences again")
    try:
        return Prepared.model_validate_json((folder / STUDY).read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptCapture(f"{folder / STUDY} does not say which study this is: {error}; analyze again") from error


def _join(folders: list[Path], into: Path) -> Summary:
    (into / COUNTS).mkdir()
    total = read_summary(folders[0])
    _copy_counts(folders[0], into, tuple(total.sequences.tolist()))
    for folder in folders[1:]:
        summary = read_summary(folder)
        _copy_counts(folder, into, tuple(summary.sequences.tolist()))
        try:
            total = merge(total, summary)
        except SummaryMismatch as error:
            raise SummaryMismatch(f"{folder} can't be merged with the others: {error}") from error
    return total


def _join_experts(folders: list[Path], into: Path) -> None:
    """Join the totals of experts, where the study has them. Raises CorruptCapture where one of the summaries lacks them."""
    have = [folder for folder in folders if has_totals(folder)]
    if not have:
        return
    if lacking := [folder for folder in folders if folder not in have]:
        raise CorruptCapture(
            f"the summary in {lacking[0]} lacks the experts that {have[0]} has: analyze those sequences again"
        )
    total = read_totals(have[0])
    for folder in have[1:]:
        total = total.merged(read_totals(folder))
    write_totals(into, total)


def _copy_counts(folder: Path, into: Path, sequences: tuple[int, ...]) -> None:
    """Copy the counts of single sequences. Raises CorruptCapture if they are not those of the totals, each sequence once."""
    counted: list[int] = []
    for path in (folder / COUNTS).glob("*.npz"):
        copy = into / COUNTS / path.name
        shutil.copyfile(path, copy)
        try:
            with open_npz(copy) as stored:
                counted += stored["sequence"].tolist()
        except UNREADABLE as error:
            raise CorruptCapture(f"{path} can't be read: {error}; analyze those sequences again") from error
    if sorted(counted) != sorted(sequences):
        own, there = (format_ranges(numbers, half_open=True) for numbers in (sequences, sorted(counted)))
        raise CorruptCapture(
            f"the totals in {folder} are of the sequences {own}, the counts in its folder {COUNTS} of {there or 'none'}: it is "
            "not whole; remove it and analyze those sequences again"
        )


def difference(one: Prepared, other: Prepared) -> str:
    """Where two studies differ, in words."""
    mine, theirs = dict(_facts(one)), dict(_facts(other))
    unlike = [f"{name} {mine.get(name)} and {theirs.get(name)}" for name in mine if mine[name] != theirs.get(name)]
    return ", ".join(unlike[:3]) or "they differ in what is captured"


def _facts(prepared: Prepared) -> Iterator[tuple[str, Any]]:
    model, corpus, spec = prepared.model, prepared.corpus, prepared.spec
    yield "model", model.source.id
    yield "revision", model.source.revision
    yield "dtype", model.dtype
    yield "quantization", model.quantization
    yield "corpus", corpus.source
    yield "token_sha256", corpus.token_sha256[:12]
    yield "sequences", f"{corpus.num_sequences} x {corpus.sequence_length}"
    yield "sites", ",".join(spec.capture.sites)
    yield "layers", ",".join(map(str, prepared.layers))
    yield from spec.criteria.model_dump().items()
    yield "batch_sequences", spec.capture.batch_sequences
    yield "experts", spec.capture.experts
    yield "perplexity", spec.capture.perplexity
    yield "label", spec.label
    yield "model's name", spec.model.name
    yield "corpus's name", spec.corpus.name


def parse_sequences(text: str | None, num_sequences: int, batch: int) -> range | None:
    """`FIRST:STOP` as a range of sequences; None for all. Raises BadInput for an invalid range, or if it cuts a batch."""
    if text is None:
        return None
    first, colon, stop = text.partition(":")
    if not (colon and first.isdigit() and stop.isdigit() and int(first) < int(stop) <= num_sequences):
        raise BadInput(
            f"--sequences {text} is not a range of the {num_sequences} sequences: FIRST:STOP such as 0:{num_sequences}"
        )
    chosen = range(int(first), int(stop))
    if chosen.start % batch or (chosen.stop % batch and chosen.stop != num_sequences):
        raise BadInput(
            f"--sequences {text} cuts a batch of {batch} sequences, which is part of the result: begin and end at multiples of it"
        )
    return chosen
