"""The stories of `fault_table`, where OUTLIERS_TEST_FAULTS is set (`make test-faults`): minutes each."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.hooks.stale import end_stale_runs
from outliers.workspace import open_workspace
from tests.support.fault_case import Case
from tests.support.fault_kinds import RemoteCase, ShardsCase, SweepCase
from tests.support.fault_rows import keep
from tests.support.fault_table import tell
from tests.support.fault_world import GRACE_SECONDS, open_world, spec_of
from tests.support.remote import NetnsMachine, needs_root
from tests.support.ssh_studies import SESSION
from tests.support.ssh_tools import root_lacks

pytestmark = pytest.mark.servers

ALL = bool(os.environ.get("OUTLIERS_TEST_FAULTS"))
STEPS = ("extract", "analyze", "sync")

SHORT = {
    # the worst first, and a kill in the middle of a publication
    "killed": (
        1,
        [
            ("both killed before it begins", "beginning"),
            ("flow and worker killed", "extract"),
            ("flow killed", "sync"),
        ],
    ),
}
LONG = {
    # two runs at once; the job that both follow vanishes, and the store is busy: both try again, and one job works
    "two-runs": (2, [("second run", "extract"), ("raises once", "extract"), ("raises once", "sync")]),
    "raises-once": (1, [("raises once", step) for step in STEPS]),
    "raises-for-good": (1, [("raises for good", step) for step in STEPS]),
    "job-killed": (1, [("job killed", step) for step in ("extract", "analyze")]),
    "flow-killed": (1, [("flow killed", step) for step in STEPS]),
    # after the first, the worker is no longer the one that began the run
    **{f"worker-killed-{step}": (1, [("worker killed", step)]) for step in STEPS},
    "both-killed": (1, [("flow and worker killed", step) for step in STEPS]),
    "killed-before-it-begins": (1, [("both killed before it begins", "beginning")]),
    "killed-without-a-lock": (1, [("both killed before it has its lock", "extract")]),
    **{f"killed-and-cancelled-{step}": (1, [("killed, then cancelled", step)]) for step in STEPS},
    "worker-killed-and-cancelled": (1, [("worker killed, then cancelled", "extract")]),
    "cancelled": (1, [("cancelled", step) for step in STEPS]),
    "server-restarted": (1, [("server restarted", step) for step in STEPS]),
    "storage-gone": (1, [("result storage gone", step) for step in STEPS]),
    "store-down-at-first": (1, [("S3 server down", "beginning")]),
    "store-down": (1, [("S3 server down", step) for step in STEPS]),
    "second-run": (2, [("second run", step) for step in STEPS]),
    "by-hand": (1, [("extraction by hand", "extract")]),
    "by-hand-before": (1, [("extraction by hand before it", "extract")]),
}
SWEEP = ("sweep and worker killed", "sweep, study and worker killed", "sweep killed, then cancelled")
SHARDS = {
    **{
        f"parts-{fault.replace(' ', '-')}": (1, [(fault, "extract")])
        for fault in (
            "raises once",
            "job killed",
            "worker killed",
            "flow and worker killed",
            "cancelled",
            "server restarted",
        )
    },
    "parts-raises-for-good": (1, [("raises for good", step) for step in ("extract", "merge", "sync")]),
    "parts-flow-killed": (1, [("flow killed", "extract")]),
    "parts-storage-gone": (1, [("result storage gone", step) for step in ("extract", "merge", "sync")]),
    "parts-second-run": (2, [("second run", "extract"), ("second run", "sync")]),
}
SSH = {
    "provision-raises-once": (1, [("raises once", "provision"), ("machine lost", "extract")]),
    "provision-raises-for-good": (1, [("raises for good", "provision")]),
    "provision-flow-killed": (1, [("flow killed", "provision"), ("flow killed", "extract")]),
    "provision-worker-killed": (1, [("worker killed", "provision")]),
    "provision-both-killed": (1, [("flow and worker killed", "provision"), ("flow and worker killed", "extract")]),
    "provision-killed-and-cancelled": (1, [("killed, then cancelled", "provision")]),
    "provision-cancelled": (1, [("cancelled", "provision"), ("cancelled", "extract")]),
    "provision-server-restarted": (1, [("server restarted", "provision")]),
    "provision-storage-gone": (1, [("result storage gone", "provision")]),
    "provision-store-down": (1, [("S3 server down", "provision")]),
    "provision-second-run": (2, [("second run", "provision"), ("second run", "extract")]),
    "ssh-raises-for-good": (1, [("raises for good", "sync")]),
    "ssh-store-down": (1, [("S3 server down", "sync")]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, s3_server, request):
    folder = tmp_path_factory.mktemp("faults")
    with contextlib.ExitStack() as stack:
        host = None
        if ALL and root_lacks() is None:
            host = stack.enter_context(NetnsMachine(folder / "box", "box", environment=SESSION))
        made = stack.enter_context(open_world(folder, s3_server, host))
        yield made
        keep(request.config, made.rows)


@pytest.mark.long
@pytest.mark.parametrize("name", [*SHORT, *LONG])
def test_a_study_ends_as_if_nothing_had_happened(world, name):
    runs, story = (SHORT | LONG)[name]
    with Case(world, name) as case:
        tell(case, story, runs)


@pytest.mark.long  # its servers alone take half a minute
def test_reap_leaves_a_pending_run_to_a_worker_that_lives(world):
    """A worker of another computer, whose processes can't be seen here; and one that is gone."""
    home = world.home
    lives = next(worker["name"] for worker in home.post("/work_pools/outliers/workers/filter", {}))
    parameters = spec_of(world) | {"compute": {"workspace": str(world.folder / "other")}}
    runs = {name: home.start(home.study_id, parameters, state="PENDING") for name in (lives, "it is gone")}
    for name, run in runs.items():
        home.call("PATCH", f"/flow_runs/{run}/labels", {"prefect.worker.name": name})
    time.sleep(GRACE_SECONDS + 1.0)
    with temporary_settings({PREFECT_API_URL: home.api}):
        done, failed = end_stale_runs(open_workspace(world.folder / "other"), GRACE_SECONDS)
    assert not failed
    assert [runs["it is gone"] in line for line in done] == [True]
    assert home.state(runs[lives])["type"] == "PENDING"
    assert "prefect worker start" in home.state(runs["it is gone"])["message"]
    for run in runs.values():
        home.call("DELETE", f"/flow_runs/{run}")


@pytest.mark.skipif(not ALL, reason="make test-faults")
@pytest.mark.parametrize("fault", SWEEP)
def test_a_sweep_ends_as_if_nothing_had_happened(world, fault):
    with SweepCase(world, f"sweep-{SWEEP.index(fault)}") as case:
        tell(case, [(fault, "extract")])


@pytest.mark.skipif(not ALL, reason="make test-faults")
@pytest.mark.parametrize("name", SHARDS)
def test_a_study_in_parts_ends_as_if_nothing_had_happened(world, name):
    runs, story = SHARDS[name]
    with ShardsCase(world, name) as case:
        tell(case, story, runs)


@pytest.mark.skipif(not ALL, reason="make test-faults")
@needs_root
@pytest.mark.parametrize("name", SSH)
def test_a_study_over_ssh_ends_as_if_nothing_had_happened(world, name):
    runs, story = SSH[name]
    with RemoteCase(world, name) as case:
        tell(case, story, runs)
