"""What a machine has of a study now. It is asked before any cached result is believed."""

from __future__ import annotations

from outliers.dispatch.study_run import StudyRun
from outliers.dispatch.transfer import send_study
from outliers.errors import JobFailed
from outliers.machines.answers import parse_answer
from outliers.machines.base import Machine
from outliers.untrusted.visible import cut, visible

SECONDS = 120
SHOWN_CHARS = 2000


def machine_state(run: StudyRun, machine: Machine) -> dict[str, bool]:
    """{"capture": complete?, "summary": finished?, "results": finished?}. Raises MachineLost, JobFailed."""
    place = send_study(run, machine)
    argv = (*machine.python, "-m", "outliers", "state", place, "--workspace", machine.workspace)
    done = machine.run(argv, SECONDS)
    if done.returncode != 0:
        reason = visible(cut(done.stderr.strip() or done.stdout.strip(), SHOWN_CHARS))
        raise JobFailed(f"{machine.name} can't say what it has: {reason}")
    return parse_answer("state", 0, done.stdout.encode(errors="replace"), done.stderr, machine.name)
