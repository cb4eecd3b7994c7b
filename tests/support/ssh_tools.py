"""The programs that SSH machines of tests are made with: where they are, what is lacking, one run of one.

After it: `ssh_machine`, `netns`, `remote`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

START_SECONDS = 20.0

SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=SYSTEM_PATH)


SSHD = find_tool("sshd")


def sshd_lacks() -> str | None:
    """Why no sshd of this user can be tried; None if one can."""
    if not (SSHD and find_tool("ssh")):
        return "needs sshd: apt-get install openssh-server openssh-client"
    with contextlib.suppress(OSError):
        name = pwd.getpwuid(os.geteuid()).pw_name
        if re.search(rf"^{re.escape(name)}:!", Path("/etc/shadow").read_text(), re.MULTILINE):
            return f"needs an account that sshd does not take for locked: usermod -p '*' {name}"
    return None


def root_lacks() -> str | None:
    """Why this process can't make a machine of its own; None if it can."""
    status = Path("/proc/self/status")
    mask = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read_text() if status.exists() else "", re.MULTILINE)
    capabilities = int(mask[1], 16) if mask else 0
    if os.geteuid() or not capabilities >> 12 & 1 or not capabilities >> 21 & 1:  # CAP_NET_ADMIN, CAP_SYS_ADMIN
        return "needs root: makes a network namespace; CI runs this"
    missing = [tool for tool in ("sshd", "ssh", "ip", "unshare", "setpriv", "mount") if not find_tool(tool)]
    packages = "openssh-server openssh-client iproute2 util-linux"
    return f"needs {', '.join(missing)}: apt-get install {packages}" if missing else None


def run_tool(*command: object, check: bool = True, script: str | None = None) -> str:
    words = [str(word) for word in command]
    words[0] = find_tool(words[0]) or words[0]
    done = subprocess.run(words, input=script or "", capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode}:\n{script or ''}{done.stderr}")
    return done.stdout


def await_true(condition: Callable[[], object], what: Callable[[], str], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds} s: {what()}")
        time.sleep(0.01)
