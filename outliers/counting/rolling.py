"""Counts a capture window by window, and frees what is counted: --store rolling.

    <capture>/rolling/<study_id>-<first>-<stop>/sequences/<n>.npz   counts of single sequences, a file or more for each window
    <capture>/rolling/<study_id>-<first>-<stop>/<phase>-<upto>/     the summary so far: totals.npz, experts.npz, checksums.json

A window is some whole batches. Once it is captured it is counted, the summary is put on the disk, the journal says so (one line
for each study, `journal.Counted`, which also withdraws the sequences that are freed), and only then its chunks are removed. A
process that is killed goes on from the last line, with the same bits: the totals are those of one count of all sequences in
their order, wherever the windows end. The sequences before `kept` stay. What the whole corpus alone decides about float32 values
at resid (`second_look`) takes a second read of the corpus where the first did not count the right bins.

The capture's lock is held meanwhile. Knows windows, nothing of how they are captured.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from outliers.corpus.tokens import Corpus
from outliers.counting.accumulate import Tally, is_compiled
from outliers.counting.analyze import Reader, WorkItem, add_item, frame_of, journal_lines, layout_of_capture
from outliers.counting.second_look import look_at, narrow, needs_look, settle
from outliers.counting.summary import Summary
from outliers.counting.summary_files import COUNTS, STUDY, read_summary, write_summary
from outliers.errors import CaptureError, CorruptCapture
from outliers.events.stream import Reporter
from outliers.experts.count import add_sequences, begin_totals, finish_totals
from outliers.experts.sums_files import choose, load_sums
from outliers.experts.totals import ExpertTotals
from outliers.experts.totals_files import read_totals, write_totals
from outliers.files.atomic import sync_folder, write_atomic
from outliers.store.chunks import ChunkFiles, Journal
from outliers.store.journal import COUNT, DONE, LOOK, Counted
from outliers.study.expert_shapes import SUMS
from outliers.study.layout import Layout
from outliers.study.prepare import Prepared
from outliers.study.window import kept_sequences, window_sequences
from outliers.untrusted.npz import UNREADABLE, open_npz
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

Pause = Callable[[str], None]
"""Called where a kill leaves another state: `captured`, `counted` (the summary is on the disk, no line says so), `journaled`
(nothing is freed yet), `freeing` (before each sequence that is freed), `freed`. A test may end the process there."""


def go_on(point: str) -> None:
    """A Pause that is none."""


def line_of(prepared: Prepared, journal: Journal, wanted: range) -> Counted | None:
    """How far a study has counted a range of sequences; None where it has not begun."""
    return journal.counted.get((prepared.study_id, wanted.start, wanted.stop))


def is_counted(prepared: Prepared, journal: Journal, wanted: range, folder: Path) -> bool:
    """Whether a study has counted all of a range by windows, and what it kept is there: nothing is left to capture or count."""
    line = line_of(prepared, journal, wanted)
    if line is None or line.phase != DONE or not (folder / str(line.state)).is_dir():
        return False
    return all(
        sequence in journal.done for sequence in range(wanted.start, min(wanted.stop, kept_sequences(prepared.spec)))
    )


def open_windows(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    wanted: range,
    corpus: Corpus,
    layout: Layout,
    journal: Journal,
    *,
    workers: int | None = None,
    pause: Pause = go_on,
    kind: type[RollingCounts] | None = None,
) -> RollingCounts | None:
    """The windows of a study with --store rolling, or of another `kind`; None where all is captured and kept already."""
    line, missing = line_of(prepared, journal, wanted), [s for s in wanted if s not in journal.done]
    if line is None and not missing:
        log.info("the capture %s is complete: it is counted as it is, and nothing of it is freed", prepared.capture_id)
        return None
    others = [other for key, other in journal.counted.items() if line is None or key != line.key]
    again = sum(any(sequence in other.freed for other in others) for sequence in missing)
    if again and (line is None or line.phase != DONE):
        log.info(
            "%d of %d sequences were counted for another study and freed: they are captured again for this one",
            *(again, len(wanted)),
        )
    return (kind or RollingCounts)(
        prepared, workspace, reporter, wanted, corpus, layout, journal, workers=workers, pause=pause
    )


class RollingCounts:
    """The counts of a study while its capture rolls by. `extract` asks for the `next` window, captures it and gives it to
    `take`.

    journal: of the capture, with the lock held. workers: threads that count (default: a core each). Raises CaptureError and
    CorruptCapture as counting does, OSError of the disk.
    """

    def __init__(
        self,
        prepared: Prepared,
        workspace: Workspace,
        reporter: Reporter,
        wanted: range,
        corpus: Corpus,
        layout: Layout,
        journal: Journal,
        *,
        workers: int | None = None,
        pause: Pause = go_on,
    ) -> None:
        self.prepared, self.reporter, self.wanted, self.corpus = prepared, reporter, wanted, corpus
        self.folder = workspace.capture(prepared.capture_id)
        # as an analysis has it: the file has the sites in another order than the study, and the order is in results
        self.layout, self.journal, self._pause = layout_of_capture(self.folder), journal, pause
        self.files = ChunkFiles(self.folder, layout)
        self.workers = workers or os.cpu_count() or 1
        self.size = window_sequences(prepared.spec, layout, shutil.disk_usage(self.folder).free)
        line = line_of(prepared, journal, wanted) or self._begin()
        self.place = self.folder / line.place
        self.line = self._open(line)
        if not is_compiled():
            log.info("compiling the loops that count: once on this machine, about ten seconds")

    @property
    def kept(self) -> range:
        """The sequences of the range that stay on the disk."""
        return range(self.wanted.start, max(self.wanted.start, min(self.wanted.stop, self.line.kept)))

    @property
    def finished(self) -> bool:
        """Whether every window is counted."""
        return self.line.phase == DONE

    def next(self) -> range | None:
        """The window that must be captured next; None at the end."""
        if self.finished:
            return None
        return range(self.line.upto, min(self.line.upto + self.size, self.wanted.stop))

    def take(self, window: range) -> None:
        """Count a captured window, put the summary on the disk, note it in the journal, and free the window's chunks."""
        self._pause("captured")
        item = WorkItem(
            self.folder,
            self.tally.frame,
            tuple(window),
            self.corpus.lengths[window.start : window.stop],
            self.corpus.marks(window),
            self.place,
        )
        if self.line.phase == COUNT:
            self._count(item)
        else:
            lines = journal_lines(self.folder, window)
            look_at(self.summary, list(window), self.files, self.layout, lines, item.lengths.tolist(), self.workers)
        line = self._after(window)
        self._save(line)
        self._pause("counted")
        self._note(line, window)

    def _begin(self) -> Counted:
        """The line of a study that has counted nothing: it is in the journal before anything is freed."""
        first, stop = self.wanted.start, self.wanted.stop
        kept = kept_sequences(self.prepared.spec)
        line = Counted(self.prepared.study_id, first, stop, upto=first, phase=COUNT, kept=kept)
        self.journal.mark_counted(line, range(0))
        return line

    def _open(self, line: Counted) -> Counted:
        """Load the summary that a line names, remove what a killed process left, and keep as many sequences as are asked for.

        Where the summary is not what was written, all is counted anew: nothing that could be wrong is gone on with.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        frame = frame_of(self.prepared, self.layout)
        summary, experts = None, None
        try:
            if line.state is not None:
                state = self.folder / line.state
                summary = read_summary(state)
                experts = read_totals(state, whole=False) if self.layout.experts is not None else None
                self._check_sums(summary)
        except CaptureError as error:  # CorruptCapture too
            log.warning("%s: the sequences are counted anew, and those that were freed are captured again", error)
            self.journal.forget_counted(line.key)
            line, summary, experts = self._begin(), None, None
        if experts is None and self.layout.experts is not None:
            experts = begin_totals(self.prepared.study_id, self.layout)
        self.tally = Tally(frame, summary)
        self.experts: ExpertTotals | None = experts
        self._drop_leftovers(line)
        return line

    def _check_sums(self, summary: Summary) -> None:
        """Raise CaptureError where the sums of the experts lack a sequence that was counted, and freed."""
        shapes = self.layout.experts
        if shapes is None or not shapes.values:
            return
        held = {s for _, sums in choose(self.folder, shapes, self.wanted) for s in sums.sequences.tolist()}
        if lacking := set(summary.sequences.tolist()) - held:
            raise CaptureError(f"{self.folder / SUMS} lacks the sums of {len(lacking)} sequences that were counted")

    @property
    def summary(self) -> Summary:
        """The totals of the sequences that are counted."""
        return self.tally.summary

    def _drop_leftovers(self, line: Counted) -> None:
        """Remove what no line names: summaries, counts of sequences that are not counted, chunks that were to be freed."""
        for path in self.place.iterdir():
            if path.name != COUNTS and line.state != f"{line.place}/{path.name}":
                shutil.rmtree(path)
        counted = line.upto if line.phase == COUNT else line.stop
        for path in (self.place / COUNTS).glob("*"):
            if not path.stem.isdigit() or int(path.stem) >= counted:
                path.unlink()
        for sequence in line.freed:
            tokens = int(self.corpus.lengths[sequence])
            if sequence not in self.journal.done and not self.files.is_freed(sequence, tokens):
                self.files.free(sequence, tokens)

    def _count(self, item: WorkItem) -> None:
        """Add a window to the totals, and write the counts of its sequences."""
        steps = len(self.wanted) * len(self.layout.layers)
        before = (item.sequences[0] - self.wanted.start) * len(self.layout.layers)

        def progress(done: int) -> None:
            self.reporter.progress("analyze", before + done, steps, "layers")

        reader = add_item(self.tally, item, self.layout, self.workers, progress)
        total = self.tally.finish()
        total.sequences = np.concatenate([total.sequences, np.array(item.sequences, np.int64)])
        total.tokens += int(item.lengths.sum())
        if needs_look(total):
            self._look_near(item, reader)
        if self.experts is not None:
            span = range(item.sequences[0], item.sequences[-1] + 1)
            args = (self.folder, self.layout, reader.lines, span, item.lengths, item.marks, lambda done: None)
            add_sequences(self.experts, *args)

    def _look_near(self, item: WorkItem, reader: Reader) -> None:
        """Count the values of a window near the medians so far, by their bits."""
        narrow(self.summary)
        look_at(
            self.summary, item.sequences, self.files, self.layout, reader.lines, item.lengths.tolist(), self.workers
        )

    def _after(self, window: range) -> Counted:
        """The line that follows a window."""
        line = self.line
        if window.stop < line.stop:
            return Counted(**(line.__dict__ | {"upto": window.stop}))
        part = len(self.wanted) < self.layout.num_sequences
        if line.phase == COUNT and needs_look(self.summary) and not settle(self.summary, part=part):
            self._tell_look()
            return Counted(**(line.__dict__ | {"upto": line.first, "phase": LOOK}))
        return Counted(**(line.__dict__ | {"upto": line.stop, "phase": DONE}))

    def _tell_look(self) -> None:
        log.warning(
            "the median of the values at resid moved too far while %d sequences were counted: they are captured once more, for "
            "the values near it",
            len(self.wanted),
        )

    def _save(self, line: Counted) -> None:
        """Put the summary so far on the disk, whole: a folder that appears under its name once its files are there."""
        state = self.folder / str(line.state)
        draft = self.place / f".{state.name}"
        for folder in (draft, state):
            shutil.rmtree(folder, ignore_errors=True)
        draft.mkdir()
        if self.experts is not None:
            write_totals(draft, self.experts)
        write_summary(draft, self.summary)
        for path in (*draft.iterdir(), *(self.place / COUNTS).glob("*.npz")):
            if path.parent == draft or int(path.stem) >= self.line.upto:
                _sync(path)
        for folder in (draft, self.place / COUNTS):
            sync_folder(folder)
        draft.rename(state)
        sync_folder(self.place)

    def _note(self, line: Counted, window: range) -> None:
        """Write the line, and then remove what it makes needless."""
        before = self.line.state
        self.journal.mark_counted(line, window)
        self.line = line
        self._pause("journaled")
        if before is not None:
            shutil.rmtree(self.folder / before, ignore_errors=True)
        for sequence in window:
            if sequence not in self.journal.done:
                self._pause("freeing")
                self.files.free(sequence, int(self.corpus.lengths[sequence]))
        self._pause("freed")


def _sync(path: Path) -> None:
    """Wait until a file is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place_summary(prepared: Prepared, workspace: Workspace, layout: Layout, wanted: range) -> Path:
    """The private summary of a study whose windows are all counted, as `analyze` writes it; its folder.

    Raises CaptureError where they are not all counted, CorruptCapture where a file is not what was written.
    """
    folder, target = workspace.capture(prepared.capture_id), workspace.summary(prepared.capture_id, prepared.study_id)
    line = Counted(prepared.study_id, wanted.start, wanted.stop, upto=wanted.stop, phase=DONE, kept=0)
    place, state = folder / line.place, folder / str(line.state)
    total = read_summary(state)
    shutil.rmtree(target, ignore_errors=True)
    (target / COUNTS).mkdir(parents=True)
    counted: list[int] = []
    for path in sorted((place / COUNTS).glob("*.npz"), key=lambda p: int(p.stem)):
        shutil.copyfile(path, target / COUNTS / path.name)
        counted += _sequences_in(target / COUNTS / path.name)
    if counted != list(wanted) or total.sequences.tolist() != counted:
        raise CorruptCapture(
            f"{place} holds the counts of {len(counted)} of {len(wanted)} sequences: remove that folder, and the same study "
            "counts them anew"
        )
    write_atomic(target / STUDY, prepared.model_dump_json().encode())
    if layout.experts is not None:
        sums = load_sums(folder, layout.experts, wanted) if layout.experts.values else None
        write_totals(target, finish_totals(read_totals(state, whole=False), sums, folder))
    write_summary(target, total)
    return target


def _sequences_in(path: Path) -> list[int]:
    """The sequences of a file of counts, all of which is read for its checksums. Raises CorruptCapture."""
    try:
        with open_npz(path) as stored:
            arrays: dict[str, Any] = dict(stored)
            found: list[int] = arrays["sequence"].tolist()
            return found
    except UNREADABLE as error:
        raise CorruptCapture(
            f"{path} can't be read: {error}; remove its folder, and the same study counts anew"
        ) from error
