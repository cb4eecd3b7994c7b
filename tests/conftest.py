"""What every test starts from: no hub, no telemetry, one torch thread, no workspace or keys of the person who runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
for name in ("OUTLIERS_WORKSPACE", "OUTLIERS_PROVIDER", "OUTLIERS_EVENTS", "OUTLIERS_JOB", "AWS_PROFILE", "HF_TOKEN"):
    os.environ.pop(name, None)
# tests start Python hundreds of times: what is compiled is kept, as it is for everybody who does not say otherwise
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import hypothesis
import pytest

from outliers.workspace import Workspace, open_workspace
from tests.support.captured import llama, text
from tests.support.compiled_loops import start_compiling
from tests.support.fault_rows import pytest_terminal_summary, pytest_testnodedown
from tests.support.prefect_home import prefect_home
from tests.support.prefect_seed import make_seed
from tests.support.prefect_ui import browser, logged_in
from tests.support.s3 import s3_server
from tests.support.smollm2 import smollm2_workspace
from tests.support.times import SLOW, function_of

# no test is timed: a busy machine takes ten times as long for an example
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

__all__ = [
    "browser",
    "llama",
    "logged_in",
    "prefect_home",
    "pytest_terminal_summary",
    "pytest_testnodedown",
    "s3_server",
    "smollm2_workspace",
    "text",
]


def pytest_configure(config: pytest.Config) -> None:
    """Workers of xdist find what the process that starts them has made."""
    if not hasattr(config, "workerinput"):
        # several processes would compile the same at once; one alone compiles what it needs
        if config.getoption("numprocesses", None):
            config.stash[COMPILING] = start_compiling(config.cache.mkdir("loops"))
        make_seed(config.cache.mkdir("servers"))


def pytest_unconfigure(config: pytest.Config) -> None:
    compiling = config.stash.get(COMPILING, None)
    if compiling is not None:
        compiling.kill()
        compiling.wait()


COMPILING = pytest.StashKey[subprocess.Popen[bytes] | None]()


UNTOUCHED = (".ssh", ".sky", ".bashrc", ".bash_profile", ".profile", ".zshrc", ".zprofile", ".config/fish")
"""What SSH, SkyPilot and installers like to write into a user's home."""


def _listing() -> dict[str, tuple[int, int]]:
    """Every file below UNTOUCHED with its size and time of change."""
    found = {}
    for name in UNTOUCHED:
        place = Path.home() / name
        for path in (place, *(place.rglob("*") if place.is_dir() else ())):
            if path.is_file():
                found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


HEAVY = {
    "long": ("OUTLIERS_TEST_FAULTS", "make test-faults"),
    "studies": ("OUTLIERS_TEST_STUDIES", "make test-studies"),
}
"""Marks of heavy tests: the variable that lets them run, and the target of the Makefile that sets it."""


LONGEST = (
    "sweep_flow",
    "readme",
    "ssh_study",
    "ssh_faults",
    "flow",
    "shards",
    "ui",
    "fault_suite",
    "deployment",
    "prefect_server",
    "cli",
    "two_runs",
    "faults",
    "probes",
    "executors",
    "survival",
    "own_server",
    "datasets",
    "sky_given_back",
    "sky_provider",
    "publish",
    "publish_outages",
    "report",
    "checkpoints",
    "architectures",
    "properties",
)
"""Files of tests that take a minute or more, in `make test` or in a heavy target."""


ONE_SERVER = (
    ("test_sweep_flow.py", "test_remaining.py", "test_machines_release.py"),
    ("test_shards.py", "test_deployment.py", "test_flow.py"),
)
"""Files that use `prefect_home`; those of one line share a process, and so a server: one that is idle takes an eighth of a
processor. Without the heavy tests they all share one: little of each is left."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, but for the files of ONE_SERVER."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    heavy = any(os.environ.get(variable) for variable, _ in HEAVY.values())
    groups = ONE_SERVER if heavy else (sum(ONE_SERVER, ()),)
    shared = {name: names[0] for names in groups for name in names}

    class OneServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return shared.get(Path(file).name, file)

    return OneServer(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, then those that start servers: one that began last would run on alone at the end.

    What is marked `long` or `studies` runs where the variable of its target is set (HEAVY). Where OUTLIERS_TEST_FAST is set,
    slow tests and servers are left out.
    """
    if os.environ.get("OUTLIERS_TEST_FAST"):
        slow = set(SLOW.read_text().split("\n"))
        left_out = [
            item
            for item in items
            if any(item.get_closest_marker(mark) for mark in (*HEAVY, "servers")) or function_of(item.nodeid) in slow
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for mark, (variable, target) in HEAVY.items():
        if not os.environ.get(variable):
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=f"a minute or more: {target}"))
    started = {item.path for item in items if item.get_closest_marker("servers")}
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (ranks.get(item.path.name, len(ranks)), item.path not in started))


@pytest.fixture(scope="session", autouse=True)
def _home_is_left_alone():
    """No test writes the user's own ~/.ssh, ~/.sky or shell files."""
    before = _listing()
    yield
    assert _listing() == before, "files in the home folder changed while the tests ran"


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    # a space in the path: whoever keeps things in "My Studies" must not be the one to find out
    return open_workspace(tmp_path / "work space")
