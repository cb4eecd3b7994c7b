"""What every SSH machine of the tests is: an init of ours, its sshd, keys and configuration files of its own.

It keeps its disk, address and host key from `kill` to `boot`, and ends with the process that started it, however that
ends. Sessions have a HOME of their own and none of the test's environment. Nobody's ~/.ssh is read or written. After it:
`remote`, `netns`, which say where such a machine runs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.ssh_tools import SSHD, SYSTEM_PATH, await_true, run_tool

PATH = "/usr/local/bin:/usr/bin:/bin"
QUIET = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

# The first process of a machine. It keeps sshd running while the file `down` isn't there, and reaps orphans: detached
# jobs come back to it, so it finds and ends them too. SIGHUP: look again. SIGTERM, and the death of who started it:
# kill everything, end. In a pid namespace (parent 0) it is pid 1: the kernel does that part.
_INIT = """
import ctypes, os, signal, socket, sys, time
parent, hostname, down, pidfile, *command = sys.argv[1:]
signals = {signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
if parent == "0":
    socket.sethostname(hostname)
else:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    if os.getppid() != int(parent):
        sys.exit("the parent is gone")

def forget():
    if os.path.exists(pidfile):
        os.unlink(pidfile)

def children():
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                if int(stat.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    yield int(name)
        except OSError:
            pass

sshd = 0
while True:
    wanted = not os.path.exists(down)
    if wanted and not sshd:
        forget()
        environment = {"PATH": os.environ["PATH"]}
        defaults = (signal.SIGPIPE, signal.SIGXFSZ)
        sshd = os.posix_spawn(command[0], command, environment, setsigmask=(), setsigdef=defaults)
    elif sshd and not wanted:
        os.kill(sshd, signal.SIGTERM)
    got = signal.sigtimedwait(signals, 1)
    if got and got.si_signo == signal.SIGTERM:
        break
    while True:
        try:
            ended = os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            break
        if not ended:
            break
        if ended == sshd:
            sshd = 0
            forget()
            if not os.path.exists(down):
                time.sleep(0.1)
while True:
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        break
forget()
"""


def _quoted(path: Path, *, tokens: bool = False) -> str:
    """A path as one word of an OpenSSH configuration file; some of its settings take %h and the like."""
    return '"' + (str(path).replace("%", "%%") if tokens else str(path)) + '"'


class SshMachine:
    """What both kinds share: keys, configuration files, sessions, and an init that keeps sshd running."""

    address = "127.0.0.1"
    port = 22

    def __init__(
        self, folder: Path, alias: str, *, path: str = PATH, environment: Mapping[str, str] = {}, shell: str = "/bin/sh"
    ) -> None:
        self.folder = folder
        self.alias = alias
        self.home = folder / "home"
        self.config = folder / "config"
        self.log = folder / "sshd.log"
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.path = path
        self.environment = QUIET | dict(environment)
        self.shell = shell
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._built = False

    def __enter__(self):
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ssh(
        self, command: str, *options: str, input: str | bytes = b"", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """`ssh -F config OPTIONS alias COMMAND`, with its exit code and what it printed."""
        data = input.encode() if isinstance(input, str) else input
        done = subprocess.run(
            self.ssh_command(*options, command=command), input=data, capture_output=True, timeout=timeout
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def ssh_command(self, *options: str, command: str) -> list[str]:
        """The words of that command, for whoever starts it differently."""
        return ["ssh", "-F", str(self.config), *options, self.alias, command]

    def sessions(self, *, path: str | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Sessions from now on have this PATH, and these variables besides (they replace the former ones)."""
        self.path = self.path if path is None else path
        self.environment = self.environment if environment is None else dict(environment)
        values = {
            "HOME": str(self.home),
            "USER": self.user,
            "LOGNAME": self.user,
            "SHELL": self.shell,
            "LANG": "C.UTF-8",
            "PATH": self.path,
            **self.environment,
        }
        words = " ".join(shlex.quote(f"{name}={value}") for name, value in values.items())
        script = self.folder / "session.new"
        script.write_text(
            "#!/bin/sh\n"
            f"cd {shlex.quote(str(self.home))} || exit 1\n"
            f'set -- {words} ${{TERM:+"TERM=$TERM"}} "SSH_CONNECTION=$SSH_CONNECTION"\n'
            f'[ -n "$SSH_ORIGINAL_COMMAND" ] || exec /usr/bin/env -i "$@" {shlex.quote(self.shell)}\n'
            f'exec /usr/bin/env -i "$@" {shlex.quote(self.shell)} -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        script.chmod(0o755)
        script.replace(self.folder / "session")

    # The machine.

    def boot(self) -> None:
        """Starts the machine, on the disk it had, and waits until sshd listens; call it on a thread that stays."""
        if self.running:
            return
        if not self._built:
            self._built = True
            self._build()
        self._pidfile.unlink(missing_ok=True)
        self._down.unlink(missing_ok=True)
        init = [sys.executable, "-I", "-S", str(self.folder / "init.py"), self._init_parent(), self.alias]
        init += [str(self._down), str(self._pidfile), str(SSHD), "-D"]
        init += ["-f", str(self.folder / "sshd_config"), "-E", str(self.log)]
        with (self.folder / "init.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._before_init(), *init],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": SYSTEM_PATH},
                start_new_session=True,
            )
        self._await_sshd(listening=True)
        self._init = self._find_init()

    def kill(self) -> None:
        """Ends all processes of the machine at once, detached ones too, as a preemption does; its disk stays."""
        if self._process is None:
            return
        if self.running:
            self._end()
        self._process.wait()

    def close(self) -> None:
        """Ends the machine for good."""
        self.kill()

    def processes(self) -> list[tuple[int, str]]:
        """(pid as the machine sees it, command line) of what runs there: sshd, sessions, detached jobs."""
        raise NotImplementedError

    def host_pid(self, pid: int) -> int:
        """The pid that this side has for that `pid` of the machine."""
        raise NotImplementedError

    # Its sshd.

    def stop_sshd(self) -> None:
        """Ends the listener alone: new connections are refused, sessions and jobs live on."""
        if not self.running:
            raise RuntimeError(f"the machine {self.alias} isn't running")
        self._down.touch()
        os.kill(self._init, signal.SIGHUP)
        self._await_sshd(listening=False)

    def start_sshd(self) -> None:
        """The listener again, on the same port and with the same host key."""
        self._down.unlink(missing_ok=True)
        os.kill(self._init, signal.SIGHUP)
        self._await_sshd(listening=True)

    def restart_sshd(self, *, end_sessions: bool = False) -> None:
        """As `systemctl restart ssh`: sessions and detached jobs live on. With `end_sessions` connections break."""
        self.stop_sshd()
        if end_sessions:
            self.kill_sessions()
        self.start_sshd()

    def kill_sessions(self) -> bool:
        """Breaks all connections; what ran in them gets an end of input, and detached jobs live on. Whether there were any."""
        found = [pid for pid, command in self.processes() if self._is_session(command)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.host_pid(pid), signal.SIGKILL)
        return bool(found)

    @staticmethod
    def _is_session(command: str) -> bool:
        return bool(re.match(r"sshd(-session|-auth)?: (?!.*\[listener\])", command))

    # What it refuses.

    def change_host_key(self) -> None:
        """Another host key than the client knows, as after a reinstallation or with somebody in between."""
        self._use_host_key("other_host_key")

    def restore_host_key(self) -> None:
        self._use_host_key("host_key")

    def refuse_keys(self) -> None:
        """Nobody's key is accepted, until `accept_keys`."""
        (self.folder / "authorized_keys").write_text("")

    def accept_keys(self) -> None:
        (self.folder / "authorized_keys").write_text((self.folder / "id.pub").read_text())

    # How it is made.

    @property
    def _down(self) -> Path:
        return self.folder / "down"

    @property
    def _pidfile(self) -> Path:
        return self.folder / "sshd.pid"

    def _build(self) -> None:
        if not SSHD:
            raise RuntimeError("sshd is not installed: apt-get install openssh-server")
        self.home.mkdir(parents=True, exist_ok=True)
        for name in ("id", "host_key"):
            if not (self.folder / name).exists():
                self._make_key(name)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        (self.folder / "init.py").write_text(_INIT)
        self.accept_keys()
        self.sessions()
        self._write_configs("host_key")

    def _make_key(self, name: str) -> None:
        run_tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{self.alias} {name}", "-f", self.folder / name)

    def _use_host_key(self, name: str) -> None:
        if not (self.folder / name).exists():
            self._make_key(name)
        self._write_configs(name)
        if self.running and not self._down.exists():
            self.restart_sshd()

    def _write_configs(self, host_key: str) -> None:
        # bash that is started by sshd reads ~/.bashrc unless SHLVL says that it isn't the first
        sftp = shutil.which("sftp-server", path="/usr/lib/openssh:/usr/libexec/openssh:/usr/lib/ssh")
        server = {
            "ListenAddress": self.address,
            "Port": self.port,
            "HostKey": _quoted(self.folder / host_key),
            "AuthorizedKeysFile": _quoted(self.folder / "authorized_keys", tokens=True),
            "PidFile": _quoted(self._pidfile),
            "ForceCommand": shlex.quote(str(self.folder / "session")),
            "SetEnv": f'"HOME={self.home}" "SHLVL=1"',
            "UsePAM": "no",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitUserRC": "no",
            "PrintLastLog": "no",
            "PrintMotd": "no",
            "UseDNS": "no",
            "MaxStartups": "100",
            "MaxSessions": "100",
            "LogLevel": "VERBOSE",
        }
        if sftp:
            server["Subsystem"] = f"sftp {sftp}"
        (self.folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in server.items()))
        client = {
            "HostName": self.address,
            "Port": self.port,
            "User": self.user,
            "IdentityFile": _quoted(self.folder / "id", tokens=True),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": _quoted(self.folder / "known_hosts", tokens=True),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "UpdateHostKeys": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
        }
        lines = [f"  {name} {value}\n" for name, value in client.items()]
        self.config.write_text(f"Host {self.alias}\n" + "".join(lines))
        known = self.address if self.port == 22 else f"[{self.address}]:{self.port}"
        kind, key, *_ = (self.folder / "host_key.pub").read_text().split()
        (self.folder / "known_hosts").write_text(f"{known} {kind} {key}\n")

    def _await_sshd(self, *, listening: bool) -> None:
        """sshd writes its pid once it listens; the init removes it once sshd is gone."""

        def there() -> bool:
            if not self.running:
                raise RuntimeError(f"the machine {self.alias} ended: {self._tail()}")
            said = ""
            with contextlib.suppress(FileNotFoundError):  # the init may remove it at any time
                said = self._pidfile.read_text()
            return said.endswith("\n") is listening

        await_true(there, lambda: f"sshd of {self.alias} {'does not listen' if listening else 'lives'}: {self._tail()}")

    def _tail(self) -> str:
        logs = (self.folder / "init.log", self.log)
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in logs if path.exists())

    def _init_parent(self) -> str:
        return str(os.getpid())

    def _before_init(self) -> Sequence[str]:
        return ()

    def _find_init(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _end(self) -> None:
        assert self._process is not None
        self._process.terminate()
