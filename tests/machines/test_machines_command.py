"""`outliers machines ...` as a user types it, with a real sshd: what is printed, exit codes, and what is left alone."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.command import main
from outliers.jobs.jobs import JobSpec
from outliers.machines import remote
from outliers.machines.base import MachineRequest
from outliers.machines.connection import CONFIG_VARIABLE, Connection
from outliers.machines.rentals import Rentals
from outliers.machines.ssh import Host, Hosts, SshProvider
from tests.support.remote import Sshd, needs_sshd

pytestmark = pytest.mark.servers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    folder = tmp_path / "work space"
    monkeypatch.setenv("OUTLIERS_WORKSPACE", str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@pytest.fixture
def box(tmp_path, monkeypatch):
    with Sshd(tmp_path / "a box", environment={"OUTLIERS_WATCHDOG_SECONDS": "0.2"}) as machine:
        monkeypatch.setenv(CONFIG_VARIABLE, str(machine.config))
        monkeypatch.setenv(remote.PATIENCE_VARIABLE, "1")
        yield machine


@pytest.fixture
def outliers(workspace, capsys):
    """Runs a command in this process; (exit code, standard output, standard error)."""

    def run(*words):
        try:
            code = main(list(words))
        except SystemExit as end:  # argparse's own
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def held(box, workspace):
    """A machine that two runs hold, on a host that costs."""
    Hosts(workspace).add(Host("lab1", "box", python=sys.executable, price_per_hour=2.5))
    source = SshProvider(workspace)
    source.ensure("m1", MachineRequest(lease_seconds=3600), "run-1", "Study of one")
    return source.ensure("m1", MachineRequest(lease_seconds=7170), "run-2", "Study of two")


def overdue(workspace, name="m9", place="lab1", seconds=-5.0):
    Rentals(workspace).begin(name, "ssh", place, 1.0, "run-9", "an old study", seconds)


def overdue_on_a_host_that_is_gone(workspace, monkeypatch):
    """A record `m3` past its lease, of a host that does not answer."""
    config = workspace / "ssh_config"
    config.write_text("Host gone\n  HostName 127.0.0.1\n  Port 1\n")
    monkeypatch.setenv(CONFIG_VARIABLE, str(config))
    overdue(workspace, "m3", "gone")


# Hosts


@needs_sshd
def test_a_host_is_added_shown_and_forgotten(outliers, box, workspace):
    code, out, err = outliers("machines", "hosts")
    assert (code, out) == (0, "")
    assert "machines add NAME user@host" in err
    code, out, err = outliers("machines", "add", "lab1", "box", "--python", sys.executable, "--price", "2.5")
    assert (code, err) == (0, "")
    assert f"{os.cpu_count()} cores" in out
    assert f"Python {sys.version.split()[0]}" in out
    assert "--provider ssh --host lab1" in out
    code, out, _ = outliers("machines", "add", "lab2", "box", "--folder", "deep/er", "--json")
    record = json.loads(out)
    assert (code, record["name"], record["folder"], record["python"]) == (0, "lab2", "deep/er", None)
    assert record["facts"]["cpus"] >= 1
    assert record["facts"]["ram_bytes"] > 1e8
    code, out, err = outliers("machines", "hosts")
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["lab1", "box", ".outliers", sys.executable, "2.50"],
        ["lab2", "box", "deep/er", "made", "0.00"],
    ]
    code, out, err = outliers("machines", "hosts", "--plain")
    assert out.splitlines()[2] == "lab2\tbox\tdeep/er\tmade\t0.00"
    outliers("machines", "add", "lab1", "box", "--price", "3")  # replaces
    code, out, _ = outliers("machines", "hosts", "--json")
    assert [(host["name"], host["price_per_hour"]) for host in json.loads(out)["hosts"]] == [("lab1", 3), ("lab2", 0)]
    code, out, _ = outliers("machines", "remove", "lab1", "--json")
    assert (code, json.loads(out)) == (0, {"removed": "lab1"})
    code, _, err = outliers("machines", "remove", "lab1")
    assert code == 2
    assert "no host 'lab1' was added (did you mean lab2?); added: lab2" in err
    assert list(box.home.iterdir()) == []


@needs_sshd
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a b", "box"], "'a b' is not a valid name for a host"),
        (["../up", "box"], "'../up' is not a valid name for a host"),
        (["x" * 65, "box"], "at most 64"),
        (["lab1", "box", "--price", "-1"], "--price -1"),
        (["lab1", "box", "--price", "nan"], "--price nan"),
        (["lab1", "box", "--price", "inf"], "--price inf"),
        (["lab1", "box", "--price", "free"], "invalid float"),
        (["lab1"], "DESTINATION"),
        (["lab1", ""], "'' is not a valid host name: user@host, or a name of your ssh configuration"),
        (["lab1", "a b"], "'a b' is not a valid host name"),
        (["lab1", "me@box;rm -rf"], "'me@box;rm -rf' is not a valid host name"),
        (["lab1", "$(id)"], "is not a valid host name"),
        (
            ["lab1", "me@127.0.0.1:2222"],
            "Put 'Host NAME', 'HostName 127.0.0.1', 'Port 2222', 'User me' into ~/.ssh/config",
        ),
        (["lab1", "box:22"], "'box:22' is not a valid host name: a port stands in the ssh configuration"),
        (["lab1", "box", "--folder", "/proc/nowhere"], "/proc/nowhere can't be made on box"),
    ],
)
def test_what_can_not_be_added_is_refused(outliers, box, workspace, words, said):
    code, out, err = outliers("machines", "add", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert Hosts(workspace).all() == ()


@needs_sshd
def test_a_host_that_does_not_answer_is_not_added(outliers, box, workspace):
    box.change_host_key()
    code, _, err = outliers("machines", "add", "lab1", "box")
    assert code == 2
    assert "ssh-keygen -R" in err
    box.stop()
    code, _, err = outliers("machines", "add", "lab1", "box")
    assert code == 1
    assert "box can't be reached" in err
    assert Hosts(workspace).all() == ()


@pytest.mark.parametrize(
    "text",
    ["box", "me@box", "fe80::1%eth0", "::1", "me@2001:db8::7", "ssh://me@box:2222", "LAB\\me@box", "a_b+c@box-1.x"],
)
def test_what_ssh_may_call_a_host_is_left_to_it(text):
    assert Connection(text).destination == text


def test_a_destination_that_would_be_an_option_is_none(outliers, workspace, tmp_path):
    code, _, err = outliers("machines", "add", "lab1", "--", f"-oProxyCommand=touch {tmp_path}/evil")
    assert code == 2
    assert "is not a valid host name" in err
    assert not (tmp_path / "evil").exists()


def test_a_file_of_hosts_that_can_not_be_read_is_named(outliers, workspace):
    workspace.mkdir()
    (workspace / "hosts.json").write_text('{"lab1": {"nme": "x"}}')
    code, _, err = outliers("machines", "hosts")
    assert code == 2
    assert "hosts.json can't be read" in err


# What is held


@needs_sshd
def test_what_is_held_is_listed_and_released(outliers, held, workspace):
    code, out, err = outliers("machines", "list")
    assert (code, err) == (0, "")
    row = out.splitlines()[1].split()
    assert 0 <= float(row.pop(5).removeprefix("$")) < 0.1
    assert row == ["m1", "ssh", "lab1", "up", "2.50", "1:59", "h", *["Study", "of", "one,", "Study", "of", "two"]]
    code, out, _ = outliers("machines", "list", "--json")
    ((machine,), silent) = json.loads(out).values()
    assert silent == []
    assert 7160 < machine.pop("lease_seconds_left") <= 7170
    assert 0 < machine.pop("spent") < 0.1
    assert machine == {
        "name": "m1",
        "provider": "ssh",
        "place": "lab1",
        "state": "up",
        "price_per_hour": 2.5,
        "studies": ["Study of one", "Study of two"],
    }
    code, _, err = outliers("machines", "remove", "lab1")
    assert code == 2
    assert "lab1 is held by m1" in err
    handle = held.start(JobSpec("step", ("sleep", "89")))
    code, out, _ = outliers("machines", "release", "m1", "--json")
    assert (code, json.loads(out)) == (0, {"done": ["m1 on lab1 is released, its jobs are ended"], "failed": []})
    assert held.status(handle) == "cancelled"
    code, out, _ = outliers("machines", "release", "m1", "--json")
    assert (code, json.loads(out)["done"]) == (0, ["m1 is not held: there is nothing to release"])
    code, _, err = outliers("machines", "release", "m1", "never-was")
    assert (code, "no machine 'never-was' is held or rented, or ever was" in err) == (2, True)
    assert "nothing is held or rented" in outliers("machines", "list")[2]
    code, out, _ = outliers("machines", "release", "--all")
    assert (code, out.strip()) == (0, "there was nothing to do")
    assert outliers("machines", "remove", "lab1")[0] == 0


@needs_sshd
def test_all_are_released_and_one_that_is_silent_is_told(outliers, held, box, workspace):
    source = SshProvider(workspace)
    second = source.ensure("m2", MachineRequest(lease_seconds=600), "run-3", "another")
    box.config.write_text(box.config.read_text() + "Host gone\n  HostName 127.0.0.1\n  Port 1\n")
    overdue(workspace, "m3", "gone", seconds=600)
    handle = second.start(JobSpec("step", ("sleep", "88")))
    code, out, err = outliers("machines", "release", "--all")
    assert code == 1
    assert "m1 on lab1 is released" in out
    assert "m2 on lab1 is released" in out
    assert "m3 could not be released: gone can't be reached" in err
    assert second.status(handle) == "cancelled"
    assert [(rental.name, rental.state) for rental in Rentals(workspace).all()] == [("m3", "releasing")]


@pytest.mark.parametrize("words", [[], ["m1", "--all"]])
def test_what_to_release_must_be_said(outliers, words):
    code, _, err = outliers("machines", "release", *words)
    assert code == 2
    assert "name the machines to release" in err


@needs_sshd
def test_what_is_past_its_lease_is_reaped_even_where_its_host_is_gone(outliers, held, box, workspace):
    source = SshProvider(workspace)
    late = source.ensure("m2", MachineRequest(lease_seconds=600), "run-3", "another")
    handle = late.start(JobSpec("step", ("sleep", "87")))
    Rentals(workspace).hold("m2", "run-3", "another", -1)  # overdue by the record; on the host it still runs
    box.config.write_text(box.config.read_text() + "Host gone\n  HostName 127.0.0.1\n  Port 1\n")
    overdue(workspace, "m3", "gone")
    code, out, _ = outliers("machines", "reap", "--json")
    done = json.loads(out)
    assert (code, done["failed"]) == (0, [])
    assert done["done"][0] == "m2 on lab1 is released, its jobs are ended"
    assert done["done"][1].startswith("m3: its lease is over, and gone could not be asked")
    assert late.status(handle) == "cancelled"
    assert [rental.name for rental in Rentals(workspace).all()] == ["m1"]
    history = [json.loads(line) for line in (workspace / "machines/history.jsonl").read_text().splitlines()]
    assert {line["name"]: line["how"] for line in history} == {"m2": "released", "m3": "its lease ended"}
    code, out, _ = outliers("machines", "reap")
    assert (code, out.strip()) == (0, "there was nothing to do")


def test_a_provider_that_does_not_answer_spares_no_other(outliers, workspace, monkeypatch):
    """SkyPilot was used and is not installed any more: what is held over ssh is reaped all the same."""
    monkeypatch.setitem(sys.modules, "sky", None)
    (workspace / "machines").mkdir(parents=True)
    Rentals(workspace).begin("rented", "sky", "a cloud", 2.0, "run-9", "an old study", -5)
    overdue_on_a_host_that_is_gone(workspace, monkeypatch)
    code, out, _ = outliers("machines", "list", "--json")
    listed = json.loads(out)
    assert (code, {one["name"] for one in listed["machines"]}) == (0, {"rented", "m3"})
    assert "sky did not answer" in listed["silent"][0]
    code, out, _ = outliers("machines", "reap", "--json")
    done = json.loads(out)
    assert code == 1
    assert done["done"][0].startswith("m3: its lease is over")
    assert "sky did not answer, so what is past its lease there could not be ended" in done["failed"][0]
    assert "pip install" in done["failed"][0]
    assert [rental.name for rental in Rentals(workspace).all()] == ["rented"]


@needs_sshd
def test_what_can_not_be_asked_is_kept_until_its_lease_is_over(outliers, box, workspace):
    overdue(workspace, "m3", "box", seconds=600)
    box.change_host_key()
    code, _, err = outliers("machines", "release", "m3")
    assert code == 1
    assert "m3 could not be released: the host key of box" in err
    assert [rental.name for rental in Rentals(workspace).all()] == ["m3"]
    overdue(workspace, "m3", "box")
    code, out, _ = outliers("machines", "reap")
    assert code == 0
    assert "m3: its lease is over, and box could not be asked (the host key of box" in " ".join(out.split())
    assert Rentals(workspace).all() == ()


@pytest.mark.parametrize("verb", ["study", "plan"])
def test_what_is_past_its_lease_is_told_first(outliers, workspace, verb):
    words = (verb, "--model", "/no/such/model", "--corpus", "builtin:python-docs")
    overdue(workspace, seconds=600)
    code, _, err = outliers(*words)
    assert code == 2
    assert "/no/such/model" in err
    assert "past its lease" not in err
    overdue(workspace, "m8", "lab2")
    code, _, err = outliers(*words)
    assert code == 2
    assert "past its lease: m8 (ssh, lab2); `outliers machines reap`" in err
    assert err.index("past its lease") < err.index("refused")
    assert "m9" not in err


def test_an_overdue_machine_is_listed_as_over(outliers, workspace):
    overdue(workspace)
    code, out, _ = outliers("machines", "list")
    assert code == 0
    assert " over " in out.splitlines()[1]
    assert json.loads(outliers("machines", "list", "--json")[1])["machines"][0]["lease_seconds_left"] == 0


# The user's own files


def content(*folders):
    files = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    return {path: path.read_bytes() if path.is_file() else None for path in files if path.exists()}


SESSION = """
import sys, time
from pathlib import Path
from flows.cli.command import main
from outliers.jobs.jobs import JobSpec
from outliers.machines.base import MachineRequest
from outliers.machines.ssh import SshProvider
assert main(["machines", "add", "lab1", "box", "--python", sys.executable]) == 0
source = SshProvider(Path(sys.argv[1]))
machine = source.ensure("m1", MachineRequest(host="lab1", lease_seconds=60), "run-1", "a study")
machine.upload(Path(__file__ if "__file__" in globals() else sys.executable), "uploads/a.bin")
handle = machine.start(JobSpec("step", ("echo", "it ran")))
print([event.message for event in machine.follow(handle) if event.kind == "log"])
machine.result(handle)
source.hold("m1", "run-1", "a study", 60)
assert main(["machines", "list"]) == main(["machines", "release", "--all"]) == 0
"""


@needs_sshd
def test_a_session_leaves_the_users_own_files_as_they_were(box, workspace, tmp_path):
    """Of the HOME that a process is given, of the account's own, and of the account there."""
    home, account = tmp_path / "home", Path(pwd.getpwuid(os.geteuid()).pw_dir)
    for folder in (home, box.home):
        for name, text in {
            ".ssh/config": "Host *\n  User nobody\n",
            ".ssh/known_hosts": "box ssh-ed25519 AAAA\n",
            ".ssh/id_ed25519": "secret\n",
            ".bashrc": "export A=1\n",
            ".profile": "# mine\n",
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    own = [account / name for name in (".ssh", ".bashrc", ".profile", ".bash_profile", ".zshrc")]
    theirs = [box.home / name for name in (".ssh", ".bashrc", ".profile")]
    before = content(home, *own, *theirs)
    assert before[home / ".ssh/known_hosts"]
    environment = os.environ | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, workspace],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "['it ran']" in done.stdout
    assert content(home, *own, *theirs) == before
    # of ours there is one folder on the host
    assert {path.name for path in box.home.iterdir()} == {".outliers", ".ssh", ".bashrc", ".profile"}


def test_a_record_that_can_not_be_read_hides_no_other(outliers, workspace, monkeypatch):
    (workspace / "machines").mkdir(parents=True)
    torn = workspace / "machines" / "m1.json"
    torn.write_text("{")
    overdue_on_a_host_that_is_gone(workspace, monkeypatch)
    code, out, _ = outliers("machines", "list", "--json")
    listed = json.loads(out)
    assert (code, [one["name"] for one in listed["machines"]]) == (0, ["m3"])
    assert f"{torn} is not a record of a machine" in listed["silent"][0]
    code, out, _ = outliers("machines", "reap", "--json")
    done = json.loads(out)
    assert code == 1
    assert done["done"][0].startswith("m3: its lease is over")
    assert "look at the provider's own list, and remove the file" in done["failed"][0]
    assert torn.exists()
