"""Locks between processes: one holder at a time, released with its holder, and what the package filelock doesn't do."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outliers.locks import acquire, held, held_if_free, is_locked, locked

HOLDER = """
import sys, time
from pathlib import Path
from outliers.locks import held, locked
with held(Path(sys.argv[2])) if sys.argv[1] == "held" else locked(Path(sys.argv[2]), lambda: time.sleep(0.01)):
    print("holds", flush=True)
    time.sleep(600)
"""
ADDER = """
import sys, time
from pathlib import Path
from outliers.locks import locked
lock, total = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(40):
    with locked(lock, lambda: time.sleep(0.001)):
        total.write_text(str(int(total.read_text()) + 1))
"""


def unexpected() -> None:
    raise AssertionError("the lock is free")


@pytest.mark.parametrize("kind", ["held", "locked"])
def test_a_lock_ends_with_a_killed_holder(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / "lock"
    assert not is_locked(lock)
    with subprocess.Popen([sys.executable, "-c", HOLDER, kind, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holds\n"
        assert is_locked(lock)
        with held_if_free(lock) as free:
            assert not free
        holder.kill()
    assert not is_locked(lock)
    with held_if_free(lock) as free:
        assert free
        assert is_locked(lock)
    with locked(lock, unexpected):
        assert is_locked(lock)


def test_one_holder_at_a_time_although_each_removes_the_file(tmp_path: Path) -> None:
    """A waiter whose file was removed must not take its lock on that file for the lock on the name."""
    lock, total = tmp_path / "locks" / "one", tmp_path / "total"
    total.write_text("0")
    adders = [subprocess.Popen([sys.executable, "-c", ADDER, str(lock), str(total)]) for _ in range(4)]
    assert [adder.wait(120) for adder in adders] == [0] * 4
    assert total.read_text() == "160"
    assert not lock.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_wait_that_raises_gives_up_and_leaves_the_holder_its_lock(tmp_path: Path, error: type[BaseException]) -> None:
    lock = tmp_path / "lock"

    def give_up() -> None:
        raise error

    with locked(lock, unexpected):
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(error), locked(lock, give_up):
            raise AssertionError("two hold it")
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert is_locked(lock)
    assert not lock.exists()


def test_a_lock_is_held_until_the_last_process_with_its_descriptor_ends(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    handle = acquire(lock)
    child = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(child, stdin=subprocess.PIPE, pass_fds=(handle,)):
        os.close(handle)
        assert is_locked(lock)
    assert not is_locked(lock)


def test_a_child_does_not_inherit_a_lock_that_it_is_not_given(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert not is_locked(lock)
    child.communicate()


def test_those_who_ask_do_not_see_one_another(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock):
        pass
    assert lock.exists()
    with lock.open("rb") as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # another one is asking
        assert not is_locked(lock)
