"""A machine rented for real: SkyPilot on Debian's Slurm, whose GPUs are declared and not there. `make test-slurm`.

One cluster, one machine after the other; what a study does on it is what it does on any machine over ssh. A node's
nvidia-smi says what Slurm was told, and the studies compute without (--gpu-count 0).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import slurm_cluster, tiny

NAME = "outliers-slurm"
REASON = "rents for minutes: `make test-slurm` installs what it needs and runs it"
pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(not os.environ.get("OUTLIERS_TEST_SLURM"), reason=REASON),
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]
LIMIT = 900.0
"""Seconds in which anything that is waited for has happened, on the slowest computer."""
BIN = Path(sys.executable).parent
SMI = """#!/bin/sh
for number in 1 2; do echo "GPU-$number, NVIDIA A100-SXM4-80GB, 81920"; done
"""
RENT = """
import sys
from pathlib import Path
from outliers.machines.providers import provider
from outliers.machines.base import MachineRequest
import logging
logging.basicConfig(level=logging.INFO)
source = provider("sky", Path(sys.argv[1]))
request = MachineRequest(gpu_count=2, gpu_filter="A100-80GB", min_vram_bytes=80_000_000_000, lease_seconds=900)
offers, excluded = source.offers(request)
print([offer.name for offer in offers], excluded, file=sys.stderr)
machine = source.ensure(sys.argv[2], request, "test", "a test")
print(len(machine.facts().gpus), machine.instance_id)
"""


class Renter:
    """The control side: a workspace and the environment in which SkyPilot knows the Slurm cluster."""

    def __init__(self, cluster, folder: Path) -> None:
        self.cluster = cluster
        self.workspace = folder / "workspace"
        self.environment = cluster.environment | {
            "OUTLIERS_WORKSPACE": str(self.workspace),
            "OUTLIERS_PATIENCE_SECONDS": "20",
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
        }
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self._model = tiny.make_model(folder / "model", "Llama", dtype="bfloat16", num_hidden_layers=12)

    def study(self, text: str, provider: str = "sky") -> tuple[str, ...]:
        """The words of a study of a text of its own: no other one has made its results, or its capture."""
        book = self._folder / f"{text}.txt"
        book.write_text(f"{text}: all that is gold does not glitter, not all those who wander are lost. " * 900)
        corpus = ("--corpus", str(book), "--num-sequences", "60", "--sequence-length", "128")
        rented = ("--upload-model", "--gpu-count", "0") if provider == "sky" else ()
        return ("study", "--provider", provider, "--model", str(self._model), *corpus, *rented)

    def rent(self, name: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", RENT, str(self.workspace), name],
            env=self.environment, capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + self.cluster.logs()
        return done.stdout.split()[-2:]

    def outliers(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "outliers"), *arguments],
            env=self.environment, capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        command = [str(BIN / "outliers"), *arguments]
        with log.open("wb") as file:
            self._started.append(subprocess.Popen(command, env=self.environment, stdout=file, stderr=file))
        return self._started[-1]

    def end(self) -> None:
        """No command lives on where a test failed: it would rent while the next one does, or start its own API server."""
        while self._started:
            process = self._started.pop()
            process.kill()
            process.wait()

    def machines(self) -> dict[str, dict]:
        done = self.outliers("machines", "list", "--json")
        assert done.returncode == 0, done.stderr
        return {one["name"]: one for one in json.loads(done.stdout)["machines"]}

    def jobs(self) -> str:
        """Number and name of each allocation; a name begins with the machine's."""
        return self.cluster.run("squeue", "--noheader", "--format", "%i %j")

    def record(self, name: str) -> Path:
        """What this side wrote down before it asked for anything."""
        return self.workspace / "machines" / f"{name}.json"

    def strike(self, name: str, condition, lease_seconds: int, log: Path) -> None:
        """Kill a study, with all that is in its process, at the moment of a condition: before its launch has returned."""
        process = self.start(*self.study(name), "--machine", name, "--lease-seconds", str(lease_seconds), log=log)
        wait_for(lambda: process.poll() is not None or condition(), poll_seconds=0.01)
        assert process.poll() is None, log.read_text(errors="replace")
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        assert json.loads(self.record(name).read_text())["state"] == "launching"

    def nothing_stays(self, name: str, quiet_seconds: float = 0.0) -> None:
        """Neither a record nor a cluster nor an allocation; nor one that is made later, by an order that was overlooked."""
        wait_for(lambda: not self.jobs().strip())
        time.sleep(quiet_seconds)
        assert not self.jobs().strip()
        assert self.machines() == {}
        assert not self.record(name).exists()
        sky = subprocess.run(
            [str(BIN / "sky"), "status"],
            env=self.environment, cwd=self.cluster.home, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert name not in sky.stdout


@pytest.fixture(scope="module")
def renter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.SlurmCluster(folder / "cluster") as cluster:
        smi = folder / "cluster" / "bin-node" / "nvidia-smi"
        smi.write_text(SMI)
        smi.chmod(0o755)
        yield Renter(cluster, folder)


@pytest.fixture(autouse=True)
def _nothing_is_left(renter):
    yield
    renter.end()


def wait_for(condition, seconds=LIMIT, poll_seconds=0.5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(poll_seconds)


def test_rent_study_keep_release(renter):
    gpus, instance = renter.rent(NAME)
    assert int(gpus) == 2
    assert renter.jobs().strip()
    again, same = renter.rent(NAME)
    assert (again, same) == (gpus, instance)

    done = renter.outliers(*renter.study("kept"), "--machine", NAME, "--keep-running", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # the step's own lines came, live, from the rented machine
    assert "loaded" in done.stderr and "one pass over 60 sequences" in " ".join(done.stderr.split())
    manifest = json.loads((Path(result["results"]) / "manifest.json").read_text())
    machine = manifest["provenance"]["machine"]
    assert machine["provider"] == "sky"
    assert 0 < machine["received_bytes"] < 2_000_000
    assert not list((renter.workspace / "captures").glob("*/activations.zarr"))
    here = renter.study("kept", provider="local")
    local = renter.outliers(*here, "--workspace", str(renter.workspace) + "2", "--json")
    assert local.returncode == 0, local.stderr
    other = json.loads((Path(json.loads(local.stdout)["results"]) / "manifest.json").read_text())
    assert other["results_digest"] == manifest["results_digest"]

    held = renter.machines()[NAME]
    assert held["provider"] == "sky"
    assert held["lease_seconds_left"] > 40_000
    released = renter.outliers("machines", "release", NAME)
    assert (released.returncode, "is released" in released.stdout) == (0, True)
    assert NAME not in renter.machines()
    wait_for(lambda: not renter.jobs().strip())
    assert "nothing to release" in renter.outliers("machines", "release", NAME).stdout
    # given up by its other holder, which knows nothing of that
    assert renter.outliers("machines", "reap").returncode == 0


def test_cancelled_in_the_middle_and_released_at_once(renter, tmp_path):
    process = renter.start(*renter.study("cancelled"), log=tmp_path / "log")
    wait_for(lambda: process.poll() is not None or "one pass over" in (tmp_path / "log").read_text(errors="replace"))
    assert process.poll() is None, (tmp_path / "log").read_text(errors="replace")
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130
    wait_for(lambda: not renter.jobs().strip())
    wait_for(lambda: not renter.machines())


def test_a_lost_machine_is_named_and_another_is_rented(renter, tmp_path):
    options = (*renter.study("lost"), "--machine", "outliers-lost")
    process = renter.start(*options, log=tmp_path / "log")
    wait_for(lambda: process.poll() is not None or "one pass over" in (tmp_path / "log").read_text(errors="replace"))
    assert process.poll() is None, (tmp_path / "log").read_text(errors="replace")
    for line in renter.jobs().splitlines():
        renter.cluster.run("scancel", line.split()[0])
    code, said = process.wait(LIMIT), (tmp_path / "log").read_text(errors="replace")
    if code:  # lost beyond its retries: the same command again is what a person would do
        assert "outliers-lost" in said
        done = renter.outliers(*options)
        assert done.returncode == 0, done.stderr
    assert not renter.machines()
    wait_for(lambda: not renter.jobs().strip())


@pytest.mark.parametrize("moment", ["recorded", "allocated"])
@pytest.mark.parametrize("how", ["reap", "release"])
def test_this_side_is_killed_before_its_launch_returns(renter, tmp_path, moment, how):
    """The record is older than the launch, so it leads to whatever came up: also to a launch that still goes on."""
    name = f"outliers-{moment}-{how}"
    conditions = {"recorded": lambda: renter.record(name).exists(), "allocated": lambda: name in renter.jobs()}
    renter.strike(name, conditions[moment], 10 if how == "reap" else 1800, tmp_path / "log")
    listed = renter.machines()[name]
    assert (listed["provider"], listed["state"]) == ("sky", "launching")
    assert listed["place"].startswith("slurm")
    if how == "reap":
        wait_for(lambda: time.time() > json.loads(renter.record(name).read_text())["lease_until"])
    done = renter.outliers("machines", *(("reap",) if how == "reap" else ("release", name)), "--json")
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)["done"]
    assert said.startswith(f"{name} is released")
    renter.nothing_stays(name, quiet_seconds=10)
    history = (renter.workspace / "machines" / "history.jsonl").read_text().splitlines()
    assert json.loads(history[-1]) | {"name": name, "how": "released"} == json.loads(history[-1])


def test_a_machine_whose_launch_nobody_awaits_ends_with_its_lease(renter, tmp_path):
    """SkyPilot's server brings the launch to its end, and its timer ends the machine: nothing is done on this side."""
    name = "outliers-orphan"
    renter.strike(name, lambda: name in renter.jobs(), 60, tmp_path / "log")
    assert name in renter.jobs()
    wait_for(lambda: not renter.jobs().strip())
    # whether that launch had ended is unknown here: the record stays until someone has made sure
    listed = renter.machines()[name]
    assert (listed["state"], listed["lease_seconds_left"]) == ("launching", 0)
    assert renter.outliers("machines", "reap").returncode == 0
    renter.nothing_stays(name)
