"""Every executor gives the same numbers: threads, processes, a real Dask cluster of processes, also if a worker is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from outliers.counting.analyze import analyze
from outliers.counting.executors import open_executor
from outliers.counting.summary_files import read_summary
from outliers.errors import BadInput, CorruptCapture, MachineLost
from outliers.spec import StudySpec
from outliers.store.chunks import ChunkFiles
from outliers.store.fingerprint import layout_from, read_fingerprint
from outliers.workspace import open_workspace
from tests.counting.test_counting import BLOCK, random_acts, same_bits
from tests.support import synthetic

SEQUENCES = 6


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A captured study, and its Summary by one thread."""
    acts, _ = random_acts(3, "bfloat16", sites=(*BLOCK, "resid"), shape=(3, SEQUENCES, 40), width=64)
    workspace = open_workspace(tmp_path_factory.mktemp("executors"))
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts, chunk_bytes=2000)
    return prepared, workspace, read_summary(analyze(prepared, workspace, synthetic.Silent(), workers=1))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Dask scheduler and two workers, processes of their own, on loopback alone."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
        worker_dashboard_address=None,
        local_directory=str(tmp_path_factory.mktemp("dask")),
    ) as made:
        yield made


@pytest.mark.studies
def test_processes(study):
    prepared, workspace, wanted = study
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        folder = analyze(prepared, workspace, synthetic.Silent(), executor=pool, workers=2)
    same_bits(wanted, read_summary(folder))
    assert not (folder / "parts").exists()


@pytest.mark.servers
@pytest.mark.studies
def test_a_dask_cluster(study, cluster):
    prepared, workspace, wanted = study
    with open_executor(f"dask={cluster.scheduler_address}") as (executor, workers):
        assert workers == 2
        folder = analyze(prepared, workspace, synthetic.Silent(), executor=executor, workers=workers)
    same_bits(wanted, read_summary(folder))


@pytest.mark.servers
@pytest.mark.studies
def test_a_killed_worker_changes_nothing(study, cluster):
    """SIGKILL to a worker in the middle of a part: Dask gives the part to another, and the numbers are the same."""
    prepared, workspace, wanted = study
    client = cluster.get_client()
    client.wait_for_workers(2)
    killed: list[int] = []
    parts = workspace.summary(prepared.capture_id, prepared.study_id) / "parts"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            # the folder that a part is written into while it is counted names the process
            for path in parts.glob(".*") if parts.exists() else ():
                killed.append(int(path.name.split("-")[1]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.0005)

    killer = threading.Thread(target=kill)
    killer.start()
    with open_executor(f"dask={cluster.scheduler_address}") as (executor, _):
        folder = analyze(prepared, workspace, synthetic.Silent(), executor=executor, workers=SEQUENCES)
    killer.join()
    assert killed, "no part was seen while it was counted"
    same_bits(wanted, read_summary(folder))
    assert killed[0] not in client.run(os.getpid).values()


@pytest.mark.servers
@pytest.mark.studies
def test_an_error_of_a_worker_is_ours(study, cluster, tmp_path):
    """A worker elsewhere finds a flipped bit, and the error here has the same message."""
    prepared, _, _ = study
    acts, _ = random_acts(3, "bfloat16", sites=(*BLOCK, "resid"), shape=(3, SEQUENCES, 40), width=64)
    workspace = open_workspace(tmp_path)
    synthetic.write_capture(prepared, workspace, acts, chunk_bytes=2000)
    folder = workspace.capture(prepared.capture_id)
    path = ChunkFiles(folder, layout_from(read_fingerprint(folder))).path("resid", 2, 4, 1)
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    with (
        open_executor(f"dask={cluster.scheduler_address}") as (executor, workers),
        pytest.raises(CorruptCapture, match=rf"{path.name} has checksum"),
    ):
        analyze(prepared, workspace, synthetic.Silent(), executor=executor, workers=workers)


@pytest.mark.servers
@pytest.mark.studies
def test_the_step_takes_the_address(study, cluster, tmp_path):
    """`python -m outliers analyze SPEC --executor dask=ADDRESS`, and the summary says nothing of who counted."""
    prepared, workspace, wanted = study
    spec = tmp_path / "spec.json"
    spec.write_text(prepared.model_dump_json())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "outliers", "analyze", str(spec), "--workspace", str(workspace.root)),
            *("--executor", f"dask={cluster.scheduler_address}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["executor"] == "dask"
    folder = workspace.summary(prepared.capture_id, prepared.study_id)
    same_bits(wanted, read_summary(folder))
    assert b"tcp://" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["", "thread", "threads=0", "threads=x", "dask", "dask=", "dask=tcp://u@h:1", "ray=x"])
def test_an_invalid_name_is_refused_before_anything_runs(name):
    with pytest.raises(BadInput, match="--executor"), open_executor(name):
        pass
    with pytest.raises(ValueError, match="executor"):
        StudySpec.model_validate({"model": "builtin:smollm2", "compute": {"executor": name}})


def test_threads_by_name(study):
    prepared, workspace, wanted = study
    with open_executor("threads=3") as (executor, workers):
        assert (executor, workers) == (None, 3)
        same_bits(wanted, read_summary(analyze(prepared, workspace, synthetic.Silent(), executor=executor, workers=3)))


def test_nobody_at_the_address():
    with (
        pytest.raises(MachineLost, match="no Dask scheduler answers"),
        open_executor("dask=tcp://127.0.0.1:9", wait_seconds=1),
    ):
        pass


def test_a_workers_disk_that_is_not_the_same(study, tmp_path):
    """Work items that are written to a disk that this machine does not mount."""
    prepared, workspace, _ = study

    class Elsewhere:
        def submit(self, function, part):
            import concurrent.futures

            future = concurrent.futures.Future()
            future.set_result(str(tmp_path / "nowhere"))
            return future

    from outliers.errors import CaptureError

    with pytest.raises(CaptureError, match="workers must mount the workspace's disk"):
        analyze(prepared, workspace, synthetic.Silent(), executor=Elsewhere(), workers=2)
