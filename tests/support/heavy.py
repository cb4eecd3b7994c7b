"""Targets of the Makefile one after the other, and a table of what came of each: `make test-all`.

A target that fails does not keep the next one from its turn. One whose tests were all skipped has shown nothing, and counts
as failed. Standard library alone: it runs before there is an environment. Before it: the Makefile, which names the targets.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

_SUMMARY = re.compile(
    r"(?:\d+ (?:passed|failed|skipped|errors?|deselected|xfailed|xpassed|warnings?)(?:, )?)+ in [\d.]+s"
)
"""The last line of pytest: `3 passed, 1 skipped in 12.34s`."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    """One target: the exit code of make, how long it took, and the last lines of the pytest runs in it."""

    target: str
    code: int
    seconds: float
    summaries: tuple[str, ...]

    @property
    def result(self) -> str:
        """passed, failed, or nothing ran: pytest was there, and no test was carried out."""
        if self.code:
            return f"failed ({self.code})"
        if self.summaries and not any(" passed" in line for line in self.summaries):
            return "nothing ran"
        return "passed"


def run(target: str, make: Sequence[str]) -> Outcome:
    """`make TARGET`, whose lines are shown as they come."""
    began, summaries = time.monotonic(), []
    command = [*make, target]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as made:
        assert made.stdout is not None
        for line in made.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if found := _SUMMARY.search(_COLOUR.sub("", line)):
                summaries.append(found[0])
    return Outcome(target, made.returncode, time.monotonic() - began, tuple(summaries))


def table(outcomes: Sequence[Outcome]) -> str:
    """Target, result, minutes and what pytest said, in columns."""
    rows = [("target", "result", "minutes", "tests")]
    rows += [(one.target, one.result, f"{one.seconds / 60:.1f}", "; ".join(one.summaries) or "-") for one in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    return "\n".join(lines)


def main(targets: Sequence[str]) -> int:
    """Run all; 0 where each passed. Ctrl-C ends the target that runs and says what had ended before it."""
    if not targets:
        sys.exit("name the targets to run: python tests/support/heavy.py test test-browser ...")
    outcomes: list[Outcome] = []
    try:
        for number, target in enumerate(targets, 1):
            print(f"\n=== make {target} ({number} of {len(targets)})", flush=True)
            outcomes.append(run(target, [os.environ.get("MAKE", "make"), "--no-print-directory"]))
    except KeyboardInterrupt:
        print(f"\nended in {targets[len(outcomes)]}", flush=True)
    print(f"\n{table(outcomes)}", flush=True)
    return int(len(outcomes) < len(targets) or any(one.result != "passed" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
