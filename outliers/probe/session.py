"""Goes through the batches: the untouched pass once, then every change that is not journaled, in groups that share the head.

What is measured is journaled after each group, so that a killed probe goes on after it. The checks that make its numbers
worth something are made here: the untouched pass gives the capture's losses, and a change that changes nothing gives a KL of
exactly 0, with the very hooks, and layers left out, that the other changes use.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from outliers.capture.perplexity import losses
from outliers.errors import ProbeMismatch
from outliers.probe.changes import IDENTITY, REFERENCE, SHARED, Change
from outliers.probe.edits import Place
from outliers.probe.engine import Batch, Engine
from outliers.probe.formats import Ranges, quantize_edits
from outliers.probe.journal import ProbeJournal
from outliers.probe.measure import Measures, compare
from outliers.probe.sharing import Kept
from outliers.study.probe_memory import group_size

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One call of `probe` that has something to measure.

    captured: sequence -> its loss in the capture's journal, in nats, where it can be compared. errors: formats whose squared
    error is measured in the untouched pass. advance: called after each pass, with its tokens.
    """

    engine: Engine
    journal: ProbeJournal
    changes: tuple[Change, ...]
    ranges: Ranges
    kept: Kept | None
    captured: Mapping[int, float]
    errors: tuple[str, ...]
    advance: Any
    _number: int = 0
    _sums: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)

    def run(self, batches: Sequence[Batch]) -> None:
        """Measure every change on every batch. Raises ProbeMismatch where a check fails, OSError of the journal."""
        for number, batch in enumerate(batches):
            self._number = number
            self._batch(batch)

    def _batch(self, batch: Batch) -> None:
        todo = [change for change in self.changes if self.journal.lacks(change.name, batch.measured)]
        first = self.journal.lacks(REFERENCE, batch.measured)
        if not todo and not first:
            self.advance(batch.tokens * (1 + len(self.changes)))
            return
        hidden = self._untouched(batch, first)
        self.advance(batch.tokens * (1 + len(self.changes) - len(todo)))
        size = group_size(hidden.numel() * hidden.element_size())
        for start in range(0, len(todo), size):
            self._group(batch, hidden, todo[start : start + size])

    def _untouched(self, batch: Batch, first: bool) -> torch.Tensor:
        """The untouched pass's last hidden state; its measures are journaled, or compared with those that are."""
        with contextlib.ExitStack() as stack:
            if self.kept is not None:
                stack.enter_context(self.kept.filling())
            if first and self.errors:
                stack.enter_context(self.engine.looking(self._errors(batch)))
            hidden = self.engine.forward(batch)
        own, _ = compare(self.engine.head, hidden, (), batch.ids, batch.lengths[: batch.counted])
        plain = losses(self.engine.head, hidden, batch.ids, batch.lengths[: batch.counted])
        entries = []
        for sequence, measures, (nll, _) in zip(batch.measured, own, plain, strict=True):
            self._check_captured(sequence, nll)
            entry = _entry(REFERENCE, sequence, measures) | {"captured_nll": nll}
            if first and self.errors:
                entry["errors"] = self._sums.pop(sequence)
            self._check_before(entry)
            entries.append(entry)
        if first:
            self.journal.append(entries)
        return hidden

    def _check_captured(self, sequence: int, nll: float) -> None:
        wanted = self.captured.get(sequence)
        if wanted is not None and wanted != nll:
            raise ProbeMismatch(
                f"sequence {sequence} has a loss of {nll!r} nats here, and {wanted!r} in the capture's journal: the model that "
                "is probed does not compute what was captured, and nothing that follows would mean anything. Look for a changed "
                "model, another number of threads or another program; `outliers verify` checks the capture"
            )

    def _check_before(self, entry: dict[str, Any]) -> None:
        before = self.journal.done.get((REFERENCE, entry["sequence"]))
        if before is not None and any(before[name] != entry[name] for name in ("nll", "captured_nll")):
            raise ProbeMismatch(
                f"the untouched pass over sequence {entry['sequence']} has a loss of {entry['nll']!r} nats, and "
                f"{before['nll']!r} when the probe was begun: the same pass gives other numbers, and no change can be measured"
            )

    def _errors(self, batch: Batch) -> Any:
        """A look that sums squared errors of the formats and squares of the values, for each sequence and place."""
        places = tuple(self.engine.readers)
        edits = {form: quantize_edits(Change("", "map", format=form), places, self.ranges, ()) for form in self.errors}

        def look(place: Place, x: torch.Tensor) -> None:
            site, layer = place
            for row, sequence in enumerate(batch.measured):
                own = x[row, : batch.lengths[row]]
                sums = self._sums.setdefault(sequence, {})
                sums.setdefault("square", {})[f"{site} {layer}"] = float(own.double().square().sum())
                for form in self.errors:
                    made = edits[form][place](own, None)
                    lost = float((made.double() - own.double()).square().sum())
                    sums.setdefault(form, {})[f"{site} {layer}"] = lost

        return look

    def _group(self, batch: Batch, hidden: torch.Tensor, group: list[Change]) -> None:
        made = []
        for change in group:
            made.append(self.engine.run(self._shifted(change), batch, self.ranges, self.kept))
            self.advance(batch.tokens)
        _, found = compare(self.engine.head, hidden, made, batch.ids, batch.lengths[: batch.counted])
        entries = []
        for change, own in zip(group, found, strict=True):
            for sequence, measures in zip(batch.measured, own, strict=True):
                _check_identity(change, sequence, measures)
                entries.append(_entry(change.name, sequence, measures))
        self.journal.append(entries)

    def _shifted(self, change: Change) -> Change:
        """The identity that leaves out layers begins behind another kept layer in each batch."""
        if change.name != SHARED or self.kept is None or not self.kept.wanted:
            return change
        after = self.kept.wanted[self._number % len(self.kept.wanted)]
        return _behind(change, after)


def _behind(change: Change, layer: int) -> Change:
    """The change in the layers behind one alone."""
    left = tuple(number for number in change.layers if number > layer)
    return Change(change.name, change.kind, change.sites, left or change.layers[-1:])


def _check_identity(change: Change, sequence: int, measures: Measures) -> None:
    if change.name in (IDENTITY, SHARED) and measures.kl != 0:
        raise ProbeMismatch(
            f"a change that changes nothing ({change.name}) gives a KL of {measures.kl!r} nats on sequence {sequence}: two "
            "passes of this model over the same tokens differ here, so no effect of a change can be distinguished from chance"
        )


def _entry(change: str, sequence: int, measures: Measures) -> dict[str, Any]:
    return {"change": change, "sequence": sequence, **asdict(measures)}


def sharing_holds(engine: Engine, batch: Batch, kept: Kept, ranges: Ranges, sites: tuple[str, ...]) -> bool:
    """Whether leaving out layers changes no bit of the last hidden state: behind the first, a middle and the last kept layer."""
    with kept.filling():
        untouched = engine.forward(batch)
    wanted = kept.wanted
    layers = tuple(sorted({place[1] for place in engine.readers}))
    for layer in dict.fromkeys((wanted[0], wanted[len(wanted) // 2], wanted[-1])):
        change = _behind(Change(SHARED, "identity", sites, layers), layer)
        if not torch.equal(engine.run(change, batch, ranges, kept), untouched):
            return False
    return True
