"""Hosts whose login shell is not a POSIX shell, and a client whose configuration runs something else there."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import pytest

from outliers import errors
from outliers.jobs.jobs import JobSpec
from outliers.machines import deploy as deploying
from outliers.machines import remote
from outliers.machines.base import MachineRequest
from outliers.machines.connection import CONFIG_VARIABLE, Connection
from outliers.machines.ssh import Host, Hosts, SshProvider
from tests.support.one_host import FAST, box
from tests.support.remote import Sshd, needs_sshd

__all__ = ["box"]

pytestmark = [pytest.mark.servers, needs_sshd]

# What csh, fish and POSIX shells read alike: one line, `sh -c` and a word of quoted text and of \', \! and \\, with no !
# and no backslash in the quotes. Anything else is refused, as these refuse it: some at the beginning, some not at all.
STRICT = r"""#!@PYTHON@
import os, re, sys
option, line = sys.argv[1:]
found = re.fullmatch(r"sh -c ((?:'[^'!\\\n]*'|\\['!\\])+)", line)
if option != "-c" or not found:
    sys.exit("strict: code: Undefined variable.")
pieces = re.findall(r"'([^']*)'|\\(.)", found[1])
os.execvp("sh", ["sh", "-c", "".join(text + escaped for text, escaped in pieces)])
"""

ODD = 'it\'s 100% "odd" \\ \\n \\! !x !! ^a^b $HOME `id` {a,b} *\n\nsecond line! \\'


@pytest.fixture(params=["strict", "tcsh", "fish"])
def there(request, tmp_path, monkeypatch):
    """A host with that login shell, and a provider that knows it as `lab1`."""
    shell = shutil.which(request.param)
    if request.param == "strict":
        program = tmp_path / "strict"
        program.write_text(STRICT.replace("@PYTHON@", sys.executable))
        program.chmod(0o755)
        shell = str(program)
    if shell is None:
        pytest.skip(f"needs {request.param}: apt-get install {request.param}")
    with Sshd(tmp_path / "it's a box", environment=FAST, shell=shell) as machine:
        monkeypatch.setenv(CONFIG_VARIABLE, str(machine.config))
        monkeypatch.setenv(remote.PATIENCE_VARIABLE, "20")
        Hosts(tmp_path / "ws").add(Host("lab1", "box", python=sys.executable))
        yield SshProvider(tmp_path / "ws")


def test_a_machine_is_opened_used_and_left(there, tmp_path):
    machine = there.ensure("m1", MachineRequest(lease_seconds=120), "run-1", "a study")
    done = machine.run(["printf", "%s", ODD], 20)
    assert (done.returncode, done.stdout) == (0, ODD)
    assert machine.run(["sh", "-c", "kill -9 $$"], 20).returncode == -9
    (tmp_path / "out").write_bytes(bytes(range(256)) * 9_000)
    machine.upload(tmp_path / "out", "it's here!/a b")
    machine.download("it's here!/a b", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "out").read_bytes()
    handle = machine.start(JobSpec("step", (sys.executable, "-c", f"print({ODD!r}.splitlines()[0])")))
    assert [event.message for event in machine.follow(handle) if event.kind == "log"] == [ODD.splitlines()[0]]
    machine.result(handle)
    assert there.leave("m1", "run-1") == "m1 is released"


def test_what_fails_there_has_failed(there, monkeypatch):
    whole = deploying.build_wheel()
    monkeypatch.setattr(deploying, "build_wheel", lambda: replace(whole, data=whole.data[: len(whole.data) // 2]))
    with pytest.raises(errors.DeployFailed, match=r"could not be put on box: .*not a zip file"):
        there.ensure("m1", MachineRequest(lease_seconds=120), "run-1", "a study")
    script = "set -eu\ncat\nsaid='one!\ntwo'\necho \"$said\" >&2\nfalse\necho three\n"
    with pytest.raises(errors.DeployFailed, match=r"(?s)it broke on box: .*exit code 1.*one!\s+two$"):
        deploying._run_script(Connection("box"), script, "it broke")


def test_a_command_of_the_configuration_does_not_take_the_place_of_ours(box):
    with box.config.open("a") as config:
        config.write("  RemoteCommand tmux new -A -s main\n  RequestTTY force\n")
    done = Connection("box").call("echo ours; exit 3")
    assert (done.returncode, done.stdout) == (3, b"ours\n")
