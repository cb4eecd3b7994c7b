"""`outliers machines add|release|reap`, where a careless answer would leave something running: and the flow `reap`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from outliers.jobs.jobs import JobSpec
from outliers.machines import remote
from outliers.machines.base import MachineRequest
from outliers.machines.connection import CONFIG_VARIABLE
from outliers.machines.providers import PROVIDERS
from outliers.machines.rentals import Rentals
from outliers.machines.ssh import Host, Hosts, SshProvider
from tests.machines.test_machines_command import ROOT, box, held, outliers, workspace
from tests.support.cloud import Cloud
from tests.support.remote import needs_sshd

__all__ = ["box", "held", "outliers", "workspace"]  # fixtures, found by name

pytestmark = pytest.mark.servers

REAP = "import json, sys; from flows.reap import reap; print(json.dumps(reap(sys.argv[1])))"


@needs_sshd
def test_a_host_that_is_held_does_not_become_another(outliers, held, workspace):
    """What runs on the old one could not be ended any more, and `release` would say that it was."""
    before = Hosts(workspace).all()
    for words in (("other-box",), ("box", "--folder", "elsewhere", "--python", sys.executable), ("box",)):
        code, _, err = outliers("machines", "add", "lab1", *words)
        assert code == 2
        assert "lab1 is held by m1: release it first" in err
    assert Hosts(workspace).all() == before
    # what it costs may change, and the same may be said again
    assert outliers("machines", "add", "lab1", "box", "--python", sys.executable, "--price", "3")[0] == 0
    handle = held.start(JobSpec("step", ("sleep", "86")))
    assert outliers("machines", "release", "m1")[0] == 0
    assert held.status(handle) == "cancelled"
    assert outliers("machines", "add", "lab1", "box")[0] == 0


@needs_sshd
def test_a_host_that_was_never_added_does_not_become_another_either(outliers, box, workspace):
    Rentals(workspace).begin("m1", "ssh", "box", 0.0, "run-1", "a study", 600)
    code, _, err = outliers("machines", "add", "box", "other-box")
    assert code == 2
    assert "box is held by m1" in err


@pytest.mark.parametrize("words", [("--all",), ("m1",)])
def test_a_record_that_can_not_be_read_is_not_nothing(outliers, workspace, words):
    folder = workspace / "machines"
    folder.mkdir(parents=True)
    (folder / "m1.json").write_text("{")
    code, out, _ = outliers("machines", "release", *words, "--json")
    told = json.loads(out)
    assert code == 1
    assert told["failed"][0].startswith(f"{folder / 'm1.json'} is not a record of a machine")
    code, _, err = outliers("machines", "release", *words)
    assert code == 1
    assert "there was nothing to do" not in err


@needs_sshd
def test_a_broken_record_is_nothing_to_who_releases_another(outliers, held, workspace):
    (workspace / "machines" / "broken.json").write_text("{")
    code, out, _ = outliers("machines", "release", "m1", "--json")
    assert (code, json.loads(out)["failed"]) == (0, [])


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed")
def test_a_rented_machine_of_another_workspace_is_released_by_its_name(outliers, workspace, tmp_path, monkeypatch):
    """No record here tells of it; its name does. Only where SkyPilot was ever used, and for names of ours."""
    cloud = Cloud(None, workspace)
    cloud.folder = lambda name: tmp_path / "nowhere"
    monkeypatch.setitem(PROVIDERS, "sky", lambda workspace: cloud.provider())
    cloud.launch("outliers-stranger", cloud.candidates(MachineRequest())[0][0], 600)
    cloud.launch("somebodys", cloud.candidates(MachineRequest())[0][0], 600)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    nobody = "no machine 'outliers-stranger' is held or rented, or ever was"
    assert nobody in outliers("machines", "release", "outliers-stranger")[2]
    (home / ".sky").mkdir(parents=True)
    code, _, err = outliers("machines", "release", "outliers-stranger", "somebodys")
    assert (code, cloud.names("down")) == (2, [])
    assert "no machine 'somebodys' is held or rented" in err
    code, out, _ = outliers("machines", "release", "outliers-stranger", "--json")
    assert (code, json.loads(out)["done"]) == (0, ["outliers-stranger is released"])
    assert cloud.names("down") == ["outliers-stranger"]
    monkeypatch.setitem(sys.modules, "sky", None)
    assert nobody in outliers("machines", "release", "outliers-stranger")[2]


@pytest.mark.parametrize("used", [False, True])
def test_a_name_that_no_machine_has_is_refused_before_anything_is_released(
    outliers, workspace, tmp_path, monkeypatch, used
):
    """What was meant may cost a dollar an hour: silence would say that it ended. `used`: SkyPilot was, and is asked."""
    cloud = Cloud(None, workspace)
    monkeypatch.setitem(PROVIDERS, "sky", lambda workspace: cloud.provider())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / (".sky" if used else "")).mkdir(parents=True)
    records = Rentals(workspace)
    for name in ("outliers-5f0c2a9d1b7e3c46", "m1", "gone"):
        records.begin(name, "ssh", "lab1", 1.0, "run-1", "a study", 600)
    records.end("gone", "released")
    code, out, err = outliers("machines", "release", "m1", "outliers-5f0c2a9d1b7e3c64")
    assert (code, out) == (2, "")
    assert "(did you mean outliers-5f0c2a9d1b7e3c46?); held or rented: m1, outliers-5f0c2a9d1b7e3c46" in err
    assert {rental.name for rental in records.all()} == {"m1", "outliers-5f0c2a9d1b7e3c46"}
    assert "(did you mean outliers-5f0c2a9d1b7e3c46?)" in outliers("machines", "release", "outliers-5f0")[2]
    for strange in ("", " ", "M1", "../m1", "m1/"):
        code, _, err = outliers("machines", "release", strange)
        assert (code, f"no machine {strange!r} is held" in err) == (2, True), err
    # one that is gone is not an error, and does not hide one that never was
    assert outliers("machines", "release", "gone")[0] == 0
    assert outliers("machines", "release", "gone", "never")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("machines", "remove", "lab11"), "no host 'lab11' was added (did you mean lab1?); added: lab1"),
        (("captures", "rm", "abcd"), "there is no capture abcd in {}; there is: none"),
        (("verify", "abcd"), "there is no capture abcd in {}; there is: none"),
        (("runs", "show", "abcd"), "there is no study abcd in {}; there is: none"),
    ],
)
def test_names_that_nothing_has_are_refused_with_what_there_is(outliers, workspace, words, said):
    Hosts(workspace).add(Host("lab1", "box"))
    code, _, err = outliers(*words)
    assert (code, said.format(workspace) in err) == (2, True), err


# The scheduled one


def test_reap_is_scheduled_each_quarter_of_an_hour(prefect_home):
    """As `prefect deploy --all` makes it from prefect.yaml."""
    made = prefect_home.call("GET", "/deployments/name/reap/reap")
    assert made["entrypoint"] == "flows.reap.reap"
    ((schedule, active),) = [(one["schedule"], one["active"]) for one in made["schedules"]]
    assert (schedule["interval"], active, made["paused"]) == (900, True, False)


@needs_sshd
def test_the_flow_ends_what_is_past_its_lease(prefect_home, box, tmp_path):
    root = tmp_path / "a workspace"
    Hosts(root).add(Host("lab1", "box", python=sys.executable))
    source, handles = SshProvider(root), {}
    for name in ("late", "busy"):
        machine = source.ensure(name, MachineRequest(host="lab1", lease_seconds=600), "study.run", "a study")
        handles[name] = machine, machine.start(JobSpec("step", ("sleep", "85")))
    Rentals(root).hold("late", "study.run", "a study", -1)
    environment = prefect_home.environment | {CONFIG_VARIABLE: str(box.config), remote.PATIENCE_VARIABLE: "1"}

    def run():
        words = [sys.executable, "-c", REAP, root]
        return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180)

    done = run()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["late on lab1 is released, its jobs are ended"]
    assert {name: machine.status(handle) for name, (machine, handle) in handles.items()} == {
        "late": "cancelled",
        "busy": "running",
    }
    assert [one.name for one in Rentals(root).all()] == ["busy"]
    # what can't be looked at makes it fail, and hinders nothing
    (root / "machines" / "broken.json").write_text("{")
    Rentals(root).hold("busy", "study.run", "a study", -1)
    done = run()
    assert done.returncode != 0
    assert "broken.json is not a record of a machine" in done.stderr
    machine, handle = handles["busy"]
    assert machine.status(handle) == "cancelled"
    assert Rentals(root).all() == ()
