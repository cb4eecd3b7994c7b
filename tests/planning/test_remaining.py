"""What a second run of a study, or Retry, still asks of this computer: nothing that a running job has, or that is done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from outliers.counting.analyze import analyze
from outliers.errors import PlanRefused
from outliers.files.records import read_json
from outliers.jobs import jobs
from outliers.machines.local import LocalMachine, LocalProvider
from outliers.planning import remaining
from outliers.planning.download import download_bytes
from outliers.planning.remaining import JOINED, Rest, check_rest
from outliers.spec import StudySpec
from outliers.steps import run_extract, run_report
from outliers.study.demand import demand_of
from outliers.study.parts import machine_name, shard_workspace, split
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.detached import python
from tests.support.held_job import until
from tests.support.synthetic import Silent

NAPS = "import time; time.sleep(300)"


class SmallMachine(LocalMachine):
    """This computer with `ram` bytes of memory and `disk` bytes of disk free."""

    ram = disk = 0

    def facts(self):
        return replace(super().facts(), ram_available_bytes=self.ram, disk_free_bytes=self.disk)


class Small(LocalProvider):
    def __init__(self, workspace, ram=1 << 40, disk=1 << 40):
        super().__init__(workspace)
        self._free = {"ram": ram, "disk": disk}

    def _machine(self, name):
        return type("Machine", (SmallMachine,), self._free)(self._workspace, name)


@pytest.fixture
def settled(tmp_path, workspace):
    """(spec parts) -> Prepared of a tiny model and four sequences; no job that was started outlives the test."""
    folder = tiny.make_model(tmp_path / "model")

    def of(**parts):
        return prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", 4, 32) | parts), workspace)

    yield of
    for attempt in workspace.root.glob("**/jobs/*/[0-9]*"):
        jobs.cancel(attempt, grace_seconds=0)


def demanded(prepared):
    return demand_of(prepared.spec, prepared.model)


def ram_of(prepared):
    return demanded(prepared).ram_bytes


def analysis_bytes(prepared):
    return remaining.analysis_bytes(prepared, demanded(prepared).layout)


def rest_of(prepared, workspace):
    return remaining.rest_of(prepared, demanded(prepared), workspace)


def admitted(prepared, workspace, **free):
    """As `provision` and a part's task do: the request, and the machine that is found by it."""
    source = Small(workspace.root, **free)
    request = check_rest(prepared, workspace, source)
    return request, source.ensure(machine_name(prepared), request, "holder", "title")


@pytest.mark.parametrize("verb", ["extract", "analyze", "report"])
def test_a_study_whose_job_runs_asks_for_no_memory(settled, workspace, verb):
    """The job has it: nothing else is free, and Retry must join it all the same."""
    prepared = settled()
    with pytest.raises(PlanRefused, match=r"the study needs 1\.\d GB of memory, 0\.0 GB is free"):
        admitted(prepared, workspace, ram=1)
    name = prepared.capture_id if verb == "extract" else prepared.study_id
    handle = jobs.start(workspace.root, python(NAPS, f"{verb}-{name}"))
    assert rest_of(prepared, workspace) == JOINED
    request, _ = admitted(prepared, workspace, ram=1, disk=1)
    assert (request.needed_ram_bytes, request.needed_disk_bytes) == (0, 0)
    # one that is asked to end is not joined, and one that has ended has no memory
    (handle.folder / "cancel.json").write_text("{}")
    assert rest_of(prepared, workspace).ram_bytes is None
    jobs.cancel(handle.folder, grace_seconds=0)
    with pytest.raises(PlanRefused, match="of memory"):
        admitted(prepared, workspace, ram=1)


def test_another_studys_job_has_nothing_of_this_one(settled, workspace):
    prepared, other = settled(), settled(criteria={"magnitude": 8})
    assert prepared.capture_id == other.capture_id
    jobs.start(workspace.root, python(NAPS, f"analyze-{other.study_id}"))
    jobs.start(workspace.root, python(NAPS, "extract-0123456789abcdef"))
    assert rest_of(prepared, workspace).ram_bytes is None
    # the capture is of both
    jobs.start(workspace.root, python(NAPS, f"extract-{other.capture_id}"))
    assert rest_of(prepared, workspace) == JOINED


def test_what_is_captured_needs_no_room_and_no_model(settled, workspace):
    prepared = settled()
    size, counting = demanded(prepared).layout.total_bytes, analysis_bytes(prepared)
    assert counting < ram_of(prepared)
    assert rest_of(prepared, workspace) == Rest(size, None)
    run_extract(prepared, workspace, Silent(), sequences=range(3))
    assert rest_of(prepared, workspace) == Rest(size // 4, None)
    with pytest.raises(PlanRefused, match="of disk"):
        admitted(prepared, workspace, disk=size // 4 - 1)
    assert admitted(prepared, workspace, disk=size // 4)[0].needed_disk_bytes == size // 4
    with pytest.raises(PlanRefused, match="of memory"):
        admitted(prepared, workspace, ram=counting)
    run_extract(prepared, workspace, Silent())
    assert rest_of(prepared, workspace) == Rest(0, counting)
    assert admitted(prepared, workspace, ram=counting, disk=0)[0].needed_ram_bytes == counting
    with pytest.raises(PlanRefused, match="of memory"):
        admitted(prepared, workspace, ram=counting - 1)
    # its perplexity is another thing: the model computes it
    assert rest_of(settled(capture={"perplexity": True}), workspace) == Rest(0, None)


def test_finished_results_need_nothing(settled, workspace):
    prepared = settled()
    run_extract(prepared, workspace, Silent())
    analyze(prepared, workspace, Silent())
    assert rest_of(prepared, workspace).ram_bytes == analysis_bytes(prepared)
    run_report(prepared, workspace, Silent())
    shutil.rmtree(workspace.captures)
    assert rest_of(prepared, workspace) == JOINED
    admitted(prepared, workspace, ram=0, disk=0)


def test_nothing_is_known_of_another_machines_disk(settled, workspace):
    """A capture that is complete on this machine does not exist on that one."""
    prepared = settled()
    run_extract(prepared, workspace, Silent())
    there = settled(compute={"provider": "ssh"})
    assert there.capture_id == prepared.capture_id
    assert rest_of(there, workspace) == Rest(demanded(there).layout.total_bytes, None)


def test_parts_ask_for_what_is_left_of_them_together(settled, workspace):
    """Of three parts one runs and one is captured: what is left is one model and one count."""
    prepared = settled(compute={"shards": 3, "gpu_count": 0})
    one, two, three = parts = split(prepared, 3)
    size, whole = demanded(prepared).layout.total_bytes, ram_of(prepared)
    with pytest.raises(PlanRefused, match=r"3 processes need .* GB of memory, .* free: ask for fewer --shards"):
        admitted(prepared, workspace, ram=3 * whole - 1)
    admitted(prepared, workspace, ram=3 * whole)
    spaces = [open_workspace(shard_workspace(workspace, machine_name(prepared, part))) for part in parts]
    jobs.start(spaces[0].root, python(NAPS, f"extract-{prepared.capture_id}-{one.span.replace(':', '-')}"))
    (spaces[1].root / "corpora").symlink_to(workspace.corpora)
    run_extract(prepared, spaces[1], Silent(), sequences=range(two.first, two.stop))
    rests = [remaining.rest_of_shard(part, prepared, demanded(prepared), workspace) for part in parts]
    left = size // 4 * (three.stop - three.first)
    assert rests == [JOINED, Rest(0, analysis_bytes(prepared)), Rest(left, None)]
    admitted(prepared, workspace, ram=whole + analysis_bytes(prepared))
    with pytest.raises(PlanRefused, match="2 processes need"):
        admitted(prepared, workspace, ram=whole + analysis_bytes(prepared) - 1)


def test_a_broken_download_needs_room_for_the_rest(settled, tmp_path, monkeypatch):
    """A whole shard and a part of the other are there, as the hub's own cache keeps them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    info = settled().model
    source = info.source.model_copy(update={"kind": "hub", "path": "org/name", "revision": "c" * 40})
    info = info.model_copy(update={"source": source})
    size = info.weights.checkpoint_bytes
    folder = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = folder / "snapshots" / ("c" * 40), folder / "blobs"
    assert download_bytes(info) == size
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    names = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
    (snapshot / names[0]).write_bytes(b"x" * 1000)
    (blobs / "0123.incomplete").write_bytes(b"x" * 500)
    # one that is listed and gone when it is looked at: another process has it whole by now
    (blobs / "4567.incomplete").symlink_to("moved on")
    assert download_bytes(info) == size - 1500
    (snapshot / names[1]).write_bytes(b"x")
    assert download_bytes(info) == 0


# The real command, whose flow is killed while its detached jobs live, on a computer that has no memory left then.

_SMALL = """
import os, sys
from dataclasses import replace
from outliers.machines.providers import PROVIDERS
from outliers.machines.local import LocalMachine, LocalProvider
class SmallMachine(LocalMachine):
    def facts(self):
        return replace(super().facts(), ram_available_bytes=int(os.environ["FREE_BYTES"]))
class Small(LocalProvider):
    def _machine(self, name):
        return SmallMachine(self._workspace, name)
PROVIDERS["local"] = Small
from flows.cli.command import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.servers
@pytest.mark.parametrize(
    "shards", [pytest.param(1, marks=pytest.mark.studies), pytest.param(2, marks=pytest.mark.long)]
)
def test_a_second_run_joins_the_jobs_whose_memory_is_not_free(prefect_home, tmp_path, shards):
    tiny.make_model(tmp_path / "model", "Mixtral", num_hidden_layers=6)
    workspace, made = (
        open_workspace(tmp_path / "work"),
        tiny.spec_for(tmp_path / "model", "builtin:python-docs", 40, 256),
    )
    made["compute"] = {"workspace": str(workspace.root), "shards": shards}
    prepared = prepare(StudySpec.model_validate(made), workspace)
    (tmp_path / "spec.json").write_text(json.dumps(made))
    argv = [sys.executable, "-c", _SMALL, "study", "--spec", str(tmp_path / "spec.json"), "--json"]

    def environment(free):
        return prefect_home.environment | {"FREE_BYTES": str(free)}

    def command(free, log):
        with log.open("wb") as said:
            return subprocess.Popen(argv, env=environment(free), stdout=said, stderr=said, start_new_session=True)

    own = [shard_workspace(workspace, machine_name(prepared, part)) for part in split(prepared, shards)]
    roots = [workspace.root] if shards == 1 else own
    first = command(1 << 40, tmp_path / "first")
    held = []
    try:
        for root in roots:
            journal = root / "captures" / prepared.capture_id / "journal.jsonl"
            until(lambda at=journal: at.exists() and at.stat().st_size, "a journaled sequence", poll_seconds=0.002)
            (job,) = jobs.running(root)
            held.append(psutil.Process((read_json(job.folder / "started.json") or {})["child"]))
            held[-1].suspend()
        os.killpg(first.pid, signal.SIGKILL)
        first.wait(30)
        assert [len(jobs.running(root)) for root in roots] == [1] * shards, "the jobs live"
        second = command(1000, tmp_path / "second")
        # it tells what the jobs have done before it came, or it has ended
        said = tmp_path / "second"
        until(lambda: "  extract " in said.read_text() or second.poll() is not None, "the second run")
        assert second.poll() is None, said.read_text()
    finally:
        for process in held:
            process.resume()
    assert second.wait(240) == 0, said.read_text()
    records = [root / "captures" / prepared.capture_id / "extractions.jsonl" for root in roots]
    assert [len(record.read_text().splitlines()) for record in records] == [1] * shards, "the jobs were joined"
