"""Real SSH machines for tests: `Sshd` on loopback for any user, `NetnsMachine` with a network of its own for root.

Both are context managers with the same methods (`ssh_machine`). Skipped where they can't be: `needs_sshd`, `needs_root`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil
import pytest

from tests.support.netns import NetnsMachine, remove_leftovers
from tests.support.s3 import free_ports
from tests.support.ssh_machine import PATH, QUIET, SshMachine
from tests.support.ssh_tools import root_lacks, sshd_lacks

__all__ = ["PATH", "QUIET", "NetnsMachine", "Sshd", "needs_root", "needs_sshd", "remove_leftovers"]

needs_sshd = pytest.mark.skipif(sshd_lacks() is not None, reason=sshd_lacks() or "")
needs_root = pytest.mark.skipif(root_lacks() is not None, reason=root_lacks() or "")


class Sshd(SshMachine):
    """sshd on 127.0.0.1 and a free port, as the user who runs the tests; needs no root.

    It shares everything with this machine but HOME and the environment. Detached jobs end with it all the same.
    """

    def __init__(self, folder: Path, alias: str = "box", **options) -> None:
        super().__init__(folder, alias, **options)
        (self.port,) = free_ports(1)

    def start(self) -> None:
        """Starts the machine, or its stopped sshd."""
        if self.running:
            self.start_sshd()
        else:
            self.boot()

    def stop(self) -> None:
        """Ends the listener and all connections; detached jobs live on until `kill` or the end."""
        if self.running:
            self.stop_sshd()
            # one that was just being made has its name a moment later, and one that was killed is gone a moment later
            until = time.monotonic() + 20
            while self.kill_sessions() and time.monotonic() < until:
                time.sleep(0.05)

    def restart(self) -> None:
        """`stop` and `start`: same port, same host key."""
        self.stop()
        self.start()

    def processes(self) -> list[tuple[int, str]]:
        if not self.running:
            return []
        found = []
        for process in psutil.Process(self._init).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if command := process.cmdline():
                    found.append((process.pid, " ".join(command).strip()))
        return found

    def host_pid(self, pid: int) -> int:
        return pid
