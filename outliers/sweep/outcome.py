"""How the studies of a sweep ended, as values and as sentences: for the terminal, the run's log, and the sweep's state."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from outliers.publish.outcome import Outcome
from outliers.sweep.sweep import SweepStudy
from outliers.units import format_seconds

REASON_CHARACTERS = 300


class Ended(BaseModel):
    """How one study of a sweep ended."""

    model_config = ConfigDict(frozen=True)

    name: str
    model: str
    state: Literal["done", "failed", "cancelled"]
    cached: bool = False
    """The study was there already: nothing ran."""
    reason: str = ""
    study_id: str | None = None
    features: int | None = None
    """How many features are systematic; None where the results are not available here."""
    report: str | None = None
    published: str | None = None
    run: str | None = None
    """Id of the flow run, or the file with the output of the process."""
    seconds: float = 0.0

    @property
    def word(self) -> str:
        """`done`, `there already`, `failed` or `cancelled`."""
        return "there already" if self.cached else self.state


def end_of(study: SweepStudy, outcome: Outcome, run: str | None = None, seconds: float = 0.0) -> Ended:
    """The end of a study that is done."""
    return Ended(
        name=study.name,
        model=study.spec.model.id,
        state="done",
        cached=outcome.cached,
        study_id=outcome.study_id,
        features=len(outcome.systematic),
        report=outcome.report,
        published=outcome.published,
        run=run,
        seconds=round(seconds, 1),
    )


def end_without(
    study: SweepStudy,
    state: Literal["done", "failed", "cancelled"],
    reason: str,
    run: str | None = None,
    seconds: float = 0.0,
) -> Ended:
    """The end of a study without an outcome, and why."""
    return Ended(
        name=study.name, model=study.spec.model.id, state=state, reason=reason, run=run, seconds=round(seconds, 1)
    )


def sentence(study: SweepStudy, end: Ended | None) -> str:
    """One line for a study that starts (None) or ends."""
    if end is None:
        return f"{study.name}: started"
    if end.state != "done":
        return f"{study.name}: {end.state}: {short(end.reason)}"
    found = "" if end.features is None else f", {end.features} systematic feature{'' if end.features == 1 else 's'}"
    lasted = "" if end.cached else f" in {format_seconds(end.seconds)}"
    note = f" ({short(end.reason)})" if end.reason else ""
    return f"{study.name}: {end.word}{lasted}{found}{note}"


def summary(ended: tuple[Ended, ...]) -> str:
    """One sentence for the sweep's state: which failed and why, and which are done."""
    done = [end.name for end in ended if end.state == "done"]
    failed = [end for end in ended if end.state != "done"]
    if not failed:
        cached = sum(end.cached for end in ended)
        return f"{len(done)} of {len(ended)} studies are done" + (f", {cached} were there already" if cached else "")
    why = "; ".join(f"{end.name}: {short(end.reason) or end.state}" for end in failed)
    return f"{len(failed)} of {len(ended)} studies failed: {why}. Done: {', '.join(done) or 'none'}"


def short(text: str) -> str:
    """A reason in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= REASON_CHARACTERS else line[: REASON_CHARACTERS - 3] + "..."
