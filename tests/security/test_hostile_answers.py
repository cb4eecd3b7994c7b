"""A host that was taken over, over ssh: whatever it answers, this side ends with an error that names it.

The host is a real sshd whose login shell answers every command with what a test has put there.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from outliers import errors
from outliers.jobs.jobs import JobHandle, JobSpec
from outliers.machines.connection import CONFIG_VARIABLE, Connection
from outliers.machines.deploy import Deployment
from outliers.machines.probe import probe
from outliers.machines.remote import PATIENCE_VARIABLE, RemoteMachine
from outliers.untrusted import bounds
from outliers.untrusted.visible import visible
from tests.security.hostile import ACTS, DEEP, ESCAPES, LONG, archive, line, member
from tests.support.remote import Sshd, needs_sshd

pytestmark = [needs_sshd, pytest.mark.servers]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    shell = folder / "shell"
    shell.write_text('#!/bin/sh\n. "$HOME/do"\n')
    shell.chmod(0o755)
    with Sshd(folder / "box", shell=str(shell)) as box, pytest.MonkeyPatch.context() as patch:
        patch.setenv(CONFIG_VARIABLE, str(box.config))
        patch.setenv(PATIENCE_VARIABLE, "1")
        yield box


@pytest.fixture
def does(hostile):
    """Say what the host does with every command: print these bytes, or run this script."""

    def act(data: bytes = b"", script: str = "", code: int = 0) -> None:
        (hostile.home / "data").write_bytes(data)
        (hostile.home / "do").write_text(script or f'cat "$HOME/data"\nexit {code}\n')

    return act


@pytest.fixture
def machine(hostile):
    return RemoteMachine(
        name="m1", provider="ssh", connection=Connection("box"), root="/r", workspace="/r/machines/m1",
        deployment=Deployment(("python3",), "0" * 16, 0.0, "ready"), price_per_hour=0.0, instance_id="",
        lease_left=lambda: 60.0,
    )  # fmt: skip


FACTS = {
    "cpus": 4, "ram_bytes": 10**10, "ram_available_bytes": 10**9, "disk_free_bytes": 10**12, "python": "3.12.1",
    "gpus": [{"name": "NVIDIA A100", "total_bytes": 85 * 10**9, "reported": [8, 0]}],
}  # fmt: skip
ANSWER = {"facts": FACTS, "instance_id": "0" * 32}
HANDLE = JobHandle("extract-1", 1, Path("/r/machines/m1/jobs/extract-1/0001"))


def told(**changes):
    return json.dumps(ANSWER | {"facts": FACTS | changes}).encode()


HOSTILE_FACTS = {
    "nothing": b"",
    "text": b"Welcome!\n" + ESCAPES.encode(),
    "nested": DEEP.encode(),
    "not UTF-8": b'{"facts": "\xff"}',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "no facts": b"{}",
    "facts a list": b'{"facts": [], "instance_id": ""}',
    "cpus 0": told(cpus=0),
    "cpus a list": told(cpus=[1]),
    "memory negative": told(ram_bytes=-5),
    "memory 2^70": told(ram_bytes=1 << 70),
    "memory of 5,000 digits": told(ram_bytes=0).replace(b'"ram_bytes": 0', b'"ram_bytes": ' + LONG.encode()),
    "disk NaN": told(disk_free_bytes=float("nan")),
    "disk infinite": told(disk_free_bytes=float("inf")),
    "disk 1e999": told(disk_free_bytes=0).replace(b'"disk_free_bytes": 0', b'"disk_free_bytes": 1e999'),
    "disk a string": told(disk_free_bytes="much"),
    "GPUs an object": told(gpus={"name": "x"}),
    "GPUs many": told(gpus=FACTS["gpus"] * 5000),
    "GPU without a name": told(gpus=[{"total_bytes": 1}]),
    "GPU with a long name": told(gpus=[{"name": "x" * 100_000, "total_bytes": 1}]),
    "GPU of odd capability": told(gpus=[{"name": "x", "total_bytes": 1, "reported": [1]}]),
    "error a list": b'{"error": [1]}',
    "error without words": b'{"error": {}}',
    "error of lists": b'{"error": {"kind": [], "message": {}}}',
    "instance a path": json.dumps(ANSWER | {"instance_id": "../../x"}).encode(),
}


@pytest.mark.parametrize("data", HOSTILE_FACTS.values(), ids=HOSTILE_FACTS)
def test_an_answer_that_is_none_is_an_error_that_names_the_host(machine, does, data):
    does(data)
    with pytest.raises(errors.OutliersError, match="box") as caught:
        machine.facts()
    assert not ACTS.search(str(caught.value)) and len(str(caught.value)) < 3000


def test_names_in_answers_and_errors_are_visible(machine, does):
    does(told(gpus=[{"name": f"A100{ESCAPES}", "total_bytes": 1}], python=ESCAPES))
    facts = machine.facts()
    assert (facts.gpus[0].name, facts.cpus) == (f"A100{visible(ESCAPES)}", 4)
    assert not ACTS.search(facts.python)
    does(json.dumps({"error": {"kind": "BadInput", "message": f"[/red]{ESCAPES}"}}).encode())
    with pytest.raises(errors.BadInput, match=re.escape("[/red]\\x1b[31m")):
        machine.facts()
    does(script=f"printf '{ESCAPES}' >&2; exit 3")
    done = machine.connection.call("true")
    assert done.returncode == 3 and not ACTS.search(done.stderr) and not ACTS.search(done.text())


def test_each_question_takes_its_own_answer_alone(machine, does):
    does(b'{"status": "sleeping"}')
    with pytest.raises(errors.JobFailed, match="box answers 'status' with something else than an answer to it"):
        machine.status(HANDLE)
    does(b'{"name": "extract-1", "attempt": 1, "folder": "/etc"}')
    with pytest.raises(errors.JobFailed, match="box started 'extract-1' in /etc"):
        machine.start(JobSpec("extract-1", ("true",)))
    does(b'{"name": "other", "attempt": 1, "folder": "/r/machines/m1/jobs/other/0001"}')
    with pytest.raises(errors.JobFailed, match="box started 'other'"):
        machine.start(JobSpec("extract-1", ("true",)))
    does(b'{"left": 1, "holders": {}}')
    with pytest.raises(errors.JobFailed, match=r"box answers 'hold facts' .*facts: Field required"):
        machine.ask("hold", holder="a", title="b", seconds_held=1, facts=True)
    assert machine.ask("hold", holder="a", title="b", seconds_held=1) == {"left": 1, "holders": {}}
    does(b'{"left": 1e999, "holders": {}}')
    with pytest.raises(errors.JobFailed, match="box"):
        machine.ask("hold", holder="a", title="b", seconds_held=1)
    does(json.dumps({"removed": {ESCAPES: 1}}).encode())
    assert not ACTS.search(str(machine.ask("remove_captures", names=["x"])))


@pytest.mark.parametrize("stream", [1, 2])
def test_an_answer_without_end_is_cut_off(machine, does, stream):
    does(script=f"yes xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >&{stream}")
    began = time.monotonic()
    with pytest.raises(errors.JobFailed, match="box answered with more than 4,194,304 bytes, and was cut off"):
        machine.facts()
    assert time.monotonic() - began < 30
    does(told())
    assert machine.facts().cpus == 4


def test_an_archive_without_end_is_cut_off_and_nothing_stays(machine, does, tmp_path):
    head = archive(member(data=b"x" * 100))[:512]
    does(head, script='cat "$HOME/data"; yes')
    with pytest.raises(errors.JobFailed, match="box answered with more than"):
        machine.download("results/x", tmp_path / "in", max_bytes=100_000, max_files=3)
    does(archive(*(member(f"folder/{number}") for number in range(4))))
    with pytest.raises(errors.JobFailed, match=r"results/x on m1 .*more than 3 files"):
        machine.download("results/x", tmp_path / "in", max_bytes=100_000, max_files=3)
    does(archive(member(), member("folder/evil")))
    with pytest.raises(errors.JobFailed, match="'evil' came, which was not asked for"):
        machine.download("results/x", tmp_path / "in", names=("a.txt", "b.txt"))
    assert list(tmp_path.iterdir()) == []
    does(archive(member()))
    machine.download("results/x", tmp_path / "in", max_bytes=100_000, max_files=3, names=("a.txt",))
    assert (tmp_path / "in" / "a.txt").read_bytes() == b"data"


def test_lines_without_end_are_not_held_and_the_stream_goes_on(machine, does):
    ended = b'{"kind": "ended", "status": "done"}\n'
    does(line() + b"y" * (4 * bounds.LINE_BYTES) + b"\n" + line(message="after") + b"\x1b[2J\n" + ended)
    found = list(machine.follow(HANDLE))
    assert [event.message[:20] for event in found] == ["fine", "unreadable event: yy", "after", "unreadable event: \\x"]
    assert all(len(event.message) < 2000 and not ACTS.search(event.message) for event in found)
    assert found[2].end == 2 * len(line()) + len("after") - len("fine") + 4 * bounds.LINE_BYTES + 1


def test_bytes_that_never_end_a_line_count_as_silence(machine, does):
    does(script="while :; do printf x; sleep 0.05; done")
    began = time.monotonic()
    with pytest.raises(errors.MachineLost, match="box has said nothing for 1 s"):
        list(machine.connection.lines("follow", 1.0))
    assert time.monotonic() - began < 10


PROBE = {
    "system": "Linux x86_64", "cpus": "4", "ram_kb": "16000000", "available_kb": "8000000", "root": "/home/a/.outliers",
    "writable": "yes", "disk_kb": "100000000", "visible": "all", "python": "3.12.1|/usr/bin/python3||True",
}  # fmt: skip


def probed(**changes):
    found = {name: value for name, value in (PROBE | changes).items() if value is not None}
    return ("\nbegin\n" + "".join(f"{name}={value}\n" for name, value in found.items()) + "end\n").encode()


HOSTILE_PROBES = {
    **{
        f"no {name}": probed(**{name: None}) for name in ("system", "cpus", "ram_kb", "available_kb", "root", "visible")
    },
    **{f"{name} a word": probed(**{name: "many"}) for name in ("cpus", "ram_kb", "available_kb", "disk_kb")},
    **{f"{name} of 5,000 digits": probed(**{name: LONG}) for name in ("cpus", "ram_kb", "disk_kb", "limit")},
    "memory negative": probed(ram_kb="-5"),
    "memory in another script": probed(ram_kb="१२"),
    "root relative": probed(root="etc"),
    "root with escapes": probed(root=f"/a{ESCAPES}"),
    "root long": probed(root="/" + "r" * 10_000),
    "another system": probed(system=f"Plan9{ESCAPES}"),
    "nothing": b"",
    "text": ESCAPES.encode(),
}


@pytest.mark.parametrize("data", HOSTILE_PROBES.values(), ids=HOSTILE_PROBES)
def test_a_probe_that_can_not_be_is_an_error_that_names_the_host(hostile, does, data):
    does(data)
    with pytest.raises((errors.DeployFailed, errors.HostRefused), match="box") as caught:
        probe(Connection("box"), ".outliers")
    assert not ACTS.search(str(caught.value)) and len(str(caught.value)) < 3000


def test_names_in_a_probe_are_visible(hostile, does):
    gpu = f"GPU-1, A100{ESCAPES.strip()}, 81920, 8.0"
    does(probed(gpu=gpu, python=f"3.12.1|/usr/bin/python3|{ESCAPES}|True"))
    found = probe(Connection("box"), ".outliers")
    assert found.facts.gpus[0].name == f"A100{visible(ESCAPES.strip())}"
    assert found.pythons == ()  # it says of its torch what no version is
    does(probed())
    assert probe(Connection("box"), ".outliers").pythons[0].path == "/usr/bin/python3"
