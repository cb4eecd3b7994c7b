"""Who else is on the machine: a workspace and the folder of a host are for their user alone, from their first moment."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outliers.errors import WorkspaceError
from outliers.jobs.jobs import JobSpec
from outliers.machines.base import MachineRequest
from outliers.machines.connection import Connection, _socket_folder
from outliers.machines.rentals import Rentals
from outliers.machines.ssh import Host, Hosts, SshProvider
from outliers.workspace import PRIVATE, open_workspace
from tests.support.one_host import box
from tests.support.remote import needs_sshd

__all__ = ["box"]  # a fixture, found by name

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """The umask of most machines, under which everything is readable by everybody."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody reads, as /home/me is on many machines."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def readable(root: Path) -> list[str]:
    """What another user reads or lists at and below `root`."""
    done = subprocess.run(
        [
            *("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"),
            *("find", str(root), "-readable"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd="/",
    )
    return done.stdout.splitlines()


def study_in(root: Path) -> Path:
    """A workspace with a capture, a job and the records of hosts and machines."""
    workspace = open_workspace(root)
    folder = workspace.capture("0" * 16)
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").write_text("secret")
    Hosts(root).add(Host("lab1", "me@lab1"))
    Rentals(root).begin_at_one("m1", "ssh", {"lab1": 0.0}, "run-1", "a study", 60)
    (workspace.jobs / "step" / "0001").mkdir(parents=True)
    (workspace.jobs / "step" / "0001" / "events.jsonl").write_text("secret")
    return root


@needs_root
def test_another_user_reads_nothing_of_a_workspace(place: Path) -> None:
    root = study_in(place / "work" / "space")
    assert mode(root) == 0o700
    assert mode(root.parent) == 0o755  # it is not a folder of ours
    assert readable(place) == [str(place), str(root.parent)]


def test_a_workspace_is_private_from_its_first_moment(place: Path) -> None:
    """It is made so, and not changed afterwards: seen from the calls themselves."""
    seen: list[str] = []

    def watch(event: str, found: tuple[object, ...]) -> None:
        if event in ("os.mkdir", "os.chmod") and str(found[0]).startswith(f"{place}/"):
            seen.append(f"{event} {found[0]} {found[1]:o}")

    sys.addaudithook(watch)
    open_workspace(place / "workspace")
    open_workspace(place / "workspace")
    assert seen[0] == f"os.mkdir {place / 'workspace'} 700"
    assert not [line for line in seen if line.startswith("os.chmod")]


def test_a_workspace_of_an_earlier_version_is_closed_once_with_a_word(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = study_in(place / "workspace")
    root.chmod(0o755)
    open_workspace(root)
    assert mode(root) == 0o700
    assert f"{root} was open to other users of this machine (mode 755); it has mode 700 now" in caplog.text
    caplog.clear()
    open_workspace(root)
    assert caplog.text == ""


@needs_root
@pytest.mark.parametrize("bits", [0o755, 0o1777])
def test_a_folder_that_holds_other_things_is_left_as_it_is_and_what_is_made_in_it_is_private(
    place: Path, bits: int
) -> None:
    root = place / "project"
    root.mkdir()
    root.chmod(bits)
    (root / "notes.txt").write_text("for all")
    study_in(root)
    open_workspace(root)
    assert mode(root) == bits
    own = [str(root / name) for name in ("hosts.json", *PRIVATE)]
    assert not set(own) & set(readable(root))
    assert str(root / "notes.txt") in readable(root)


def test_a_home_is_not_closed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    for _ in range(2):
        open_workspace(place)
    assert mode(place) == 0o755


def test_what_was_open_in_such_a_folder_is_named(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "notes.txt").write_text("for all")
    (place / "captures").mkdir()
    open_workspace(place)
    assert mode(place / "captures") == 0o755
    assert "is open to other users of this machine, and so is captures in it" in caplog.text


def test_a_group_says_with_a_mode_that_it_shares_a_workspace(place: Path) -> None:
    root = place / "group"
    root.mkdir()
    root.chmod(0o2770)
    study_in(root)
    open_workspace(root)
    assert mode(root) == 0o2770
    assert mode(root / "hosts.json") == 0o640  # as the umask of its members says
    root.chmod(0o2775)
    open_workspace(root)
    assert mode(root) == 0o2770


@needs_root
def test_the_folder_of_another_user_is_refused(place: Path) -> None:
    root = place / "theirs"
    root.mkdir()
    os.chown(root, STRANGER - 1, STRANGER - 1)
    root.chmod(0o777)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            open_workspace(root)
        except WorkspaceError as error:
            code = 0 if f"{root} belongs to another user (uid {STRANGER - 1})" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(root.iterdir()) == []


# the sockets of ssh


def test_the_folder_of_sockets_has_no_name_that_others_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        others = Path(name) / "mine"
        others.mkdir(mode=0o700)
        # what another user puts in the way: a link to a private folder of ours, a file, an open folder
        (Path(name) / f"outliers-ssh-{os.getuid()}").symlink_to(others)
        (Path(name) / f"outliers-ssh-{os.getuid()}-00000000").symlink_to(others)
        (Path(name) / f"outliers-ssh-{os.getuid()}-00000001").write_text("")
        (Path(name) / f"outliers-ssh-{os.getuid()}-00000002").mkdir()
        (Path(name) / f"outliers-ssh-{os.getuid()}-00000002").chmod(0o777)
        folder = _socket_folder()
        assert folder.name not in {path.name for path in Path(name).iterdir()} - {folder.name}
        assert not folder.is_symlink()
        assert mode(folder) == 0o700
        assert _socket_folder() == folder
        assert list(others.iterdir()) == []
        # room for a socket's name and what ssh puts behind it while it is made
        assert len(str(folder)) + 1 + 16 + 17 <= 104


@needs_root
def test_a_folder_of_that_name_that_is_another_users_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        trap = Path(name) / f"outliers-ssh-{os.getuid()}-00000000"
        trap.mkdir(mode=0o700)
        os.chown(trap, STRANGER, STRANGER)
        assert _socket_folder() != trap


# a host over ssh


@needs_sshd
@needs_root
@pytest.mark.servers
def test_another_user_of_a_host_reads_nothing_of_a_study_there(box, tmp_path: Path) -> None:
    for folder in (box.home, *box.home.parents):
        with contextlib.suppress(OSError):
            if folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
    root = box.home / ".outliers"
    Hosts(tmp_path / "control").add(Host("lab1", "box", python=sys.executable))
    source = SshProvider(tmp_path / "control")
    machine = source.ensure("m1", MachineRequest(lease_seconds=60), "run-1", "a study")
    assert mode(root) == 0o700
    sent = tmp_path / "corpus.bin"
    sent.write_bytes(b"secret")
    machine.upload(sent, f"{machine.workspace}/corpora/x/corpus.bin")
    machine.result(machine.start(JobSpec("step", ("sh", "-c", "echo secret"))))
    assert readable(box.home) == [str(box.home)]
    # one of an earlier version
    root.chmod(0o755)
    source.hold("m1", "run-1", "a study", 60)
    assert mode(root) == 0o700
    source.release("m1")
    Connection("box").close()
