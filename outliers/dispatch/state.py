"""What of a study is on a machine now: read from the world before any cached answer is believed."""

from __future__ import annotations

from outliers.dispatch.transfer import send_study
from outliers.errors import JobFailed
from outliers.machines.answers import parse_answer
from outliers.machines.base import Machine
from outliers.study.prepare import Prepared
from outliers.untrusted.visible import cut, visible
from outliers.workspace import Workspace

SECONDS = 120
SHOWN_CHARS = 2000


def machine_state(machine: Machine, prepared: Prepared, workspace: Workspace) -> dict[str, bool]:
    """{"capture": complete?, "summary": finished?, "results": finished?}. Raises MachineLost, JobFailed."""
    place = send_study(machine, prepared, workspace)
    argv = (*machine.python, "-m", "outliers", "state", place, "--workspace", machine.workspace)
    done = machine.run(argv, SECONDS)
    if done.returncode != 0:
        said = visible(cut(done.stderr.strip() or done.stdout.strip(), SHOWN_CHARS))
        raise JobFailed(f"{machine.name} can't say what it has: {said}")
    return parse_answer("state", 0, done.stdout.encode(errors="replace"), done.stderr, machine.name)
