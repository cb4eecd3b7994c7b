"""Scenarios of faults, run one after the other, and the table of what came of each.

A story is a study that meets faults at one step after the other; after each its state is read, and what a user would do is
done. At its end the results are bit for bit the undisturbed ones, no sequence was extracted twice, and nothing is left.
`make test-faults` tells all stories and prints the table of docs/reliability.md; plain `make test` tells the short ones.
Before it: `fault_suite` and `fault_others`, the faults. After it: `test_fault_suite`.
"""

from __future__ import annotations

import contextlib
import re

from tests.support.fault_case import Case
from tests.support.fault_others import BEGUN_BY_STRIKE
from tests.support.fault_suite import STRIKES
from tests.support.fault_world import Row

STEPS = ("beginning", "provision", "extract", "analyze", "merge", "sync")


def tell(case: Case, story: list[tuple[str, str]], runs: int = 1) -> str:
    """Run a study through a story of (fault, step); returns the numbers of sequences that were extracted."""
    first = len(case.world.rows)
    if any(step == "sync" for _, step in story):
        case.world.gate.hold()
    if story[0][1] == "provision":
        case.host.stop_sshd()
    for _ in range(0 if story[0] in BEGUN_BY_STRIKE else runs):
        case.begin()
    for (fault, step), (_, following) in zip(story, [*story[1:], ("", "")], strict=True):
        if (fault, step) not in BEGUN_BY_STRIKE:
            case.hold(step)
        # the step after may be over before a strike is, as while a server starts
        with case.held_ahead(following) if following == "analyze" else contextlib.nullcontext():
            STRIKES[fault](case, step)
    for run in case.runs:
        case.wait("Completed", run=run)
    counts = case.check()
    case.close_rows(first, f"bit-identical, {counts}")
    return counts


def table(rows: list[Row]) -> str:
    """The table, in Markdown, by faults and steps."""
    order, steps = list(STRIKES), list(STEPS)
    rows = sorted(rows, key=lambda row: (order.index(row.fault), steps.index(row.step.partition(",")[0]), row.step))
    head = "| fault | step | state then | what it says | what you do | in the end |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {row.fault} | {row.step} | {row.state} | {_short(row.message)} | {row.then} | {row.ended} |" for row in rows
    )


def _short(text: str, most: int = 160) -> str:
    """As one cell; what differs from run to run (ids, addresses) is left out."""
    text = text.removeprefix("Flow run encountered an exception: ").replace("|", "/")
    # of a log the end, which says why
    text = re.sub(r"(The last lines of its log:) .*   (\S)", r"\1 ... \2", text)
    text = re.sub(r"/\S+/faults\d*/", "/", re.sub(r"[0-9a-f]{12,}", "…", text))
    text = re.sub(r"\d+\.\d+\.\d+\.\d+ port \d+", "… port …", text)
    if len(text) > most and "The last lines of its log:" in text:
        return f"{text[: most // 2]}...{text[-most // 2 + 3 :]}"
    return text if len(text) <= most else f"{text[: most - 3]}..."
