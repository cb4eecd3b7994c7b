"""The user's own `ssh` to one host: short commands, streams of lines, bytes counted, errors named for what to do.

OpenSSH itself is used and no library, because only it reads all of the user's configuration (jump hosts, agents,
keys). One connection is kept open for a minute (ControlMaster), so that a command costs a fraction of a second.
`sh` reads the commands, also where the login shell is another one (csh, fish). Host keys are checked, nothing is ever asked
at the terminal, and a dead line is noticed within ten seconds. Knows no job and no study.

$OUTLIERS_SSH_CONFIG names another configuration file than ~/.ssh/config.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from outliers.errors import BadInput, HostRefused, JobFailed, MachineLost
from outliers.locks import held
from outliers.machines.destination import check_destination
from outliers.machines.pipes import Line, Silence, TooMuch, exchange, read_lines
from outliers.untrusted.bounds import ANSWER_BYTES, STDERR_BYTES
from outliers.untrusted.visible import cut, visible, visible_line

CONFIG_VARIABLE = "OUTLIERS_SSH_CONFIG"
CONNECT_SECONDS = 15
PERSIST_SECONDS = 60
_LOST = 255
_SAID_CHARS = 2000
"""At most this much of what ssh itself prints is shown."""
_SOCKETS = "outliers-ssh-"
_CHUNK = 1 << 16
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_SECONDS),
    # a cut cable is noticed in nine seconds
    "ServerAliveInterval": "3",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RequestTTY": "no",
    # of the configuration, such as tmux: it would replace the command
    "RemoteCommand": "none",
    "UpdateHostKeys": "no",
    "LogLevel": "ERROR",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command on the host ended; `stdout` as the bytes that came, `stderr` as text that can be shown."""

    returncode: int
    stdout: bytes
    stderr: str

    def text(self) -> str:
        """Standard output as text that can be shown, or standard error where there is none."""
        return visible(self.stdout.decode(errors="replace")).strip() or self.stderr.strip()


class Connection:
    """One host, by any name that `ssh` understands. `sent` and `received`: bytes of commands, files and answers.

    `check_host_key`: a host whose key is not in known_hosts is refused, whatever the configuration says.
    """

    def __init__(self, destination: str, *, config: Path | None = None, check_host_key: bool = True) -> None:
        if shutil.which("ssh") is None:
            raise BadInput("there is no ssh here: install OpenSSH's client (Debian: apt install openssh-client)")
        check_destination(destination)
        self.destination = destination
        named = os.environ.get(CONFIG_VARIABLE)
        self._config = config or (Path(named).expanduser() if named else None)
        self._check_host_key = check_host_key
        self.sent = 0
        self.received = 0
        self._lock = threading.Lock()

    def call(
        self, command: str, stdin: bytes = b"", timeout_seconds: float = 60.0, most_bytes: int = ANSWER_BYTES
    ) -> Answer:
        """Run one shell command to its end, whatever its exit code.

        Raises MachineLost where the host can't be reached, HostRefused for keys, JobFailed where it takes longer or answers
        with more than `most_bytes`.
        """
        return self._exchange(command, stdin, timeout_seconds, most_bytes)

    def receive(self, command: str, sink: IO[bytes], most_bytes: int, timeout_seconds: float) -> Answer:
        """As `call`; what the command prints goes to a file and is not in the answer."""
        return self._exchange(command, b"", timeout_seconds, most_bytes, sink)

    def _exchange(
        self, command: str, stdin: bytes, seconds: float, most_bytes: int, sink: IO[bytes] | None = None
    ) -> Answer:
        self._open_master()
        process = self._spawn(command, subprocess.PIPE)
        try:
            stdout, stderr = exchange(process, stdin, seconds, most_bytes, sink)
        except subprocess.TimeoutExpired as error:
            raise JobFailed(f"{self.destination} has not ended this within {seconds:g} s: {_short(command)}") from error
        except TooMuch as error:
            raise self._too_much(error, command) from error
        finally:
            _end(process)
        self._count(len(command) + len(stdin), len(stderr) + (len(stdout) if sink is None else sink.tell()))
        said = visible(stderr.decode(errors="replace"))
        self._check(process.returncode, said)
        return Answer(process.returncode, stdout, said)

    def _too_much(self, error: TooMuch, command: str) -> JobFailed:
        return JobFailed(f"{self.destination} answered with {error}, and was cut off: {_short(command)}")

    def send(self, command: str, source: Path, offset: int, timeout_seconds: float) -> Answer:
        """Run a command with the bytes of a file from `offset` on as its standard input; as `call`."""
        self._open_master()
        size = source.stat().st_size - offset
        with source.open("rb") as file:
            file.seek(offset)
            # the file itself and no pipe: nothing of it is held in memory
            process = self._spawn(command, file)
            try:
                stdout, stderr = exchange(process, b"", timeout_seconds)
            except subprocess.TimeoutExpired as error:
                raise MachineLost(
                    f"{source.name} ({size / 1e6:,.0f} MB) did not reach {self.destination} within {timeout_seconds:g} s"
                ) from error
            except TooMuch as error:
                raise self._too_much(error, command) from error
            finally:
                _end(process)
        answer = Answer(process.returncode, stdout, visible(stderr.decode(errors="replace")))
        self._check(answer.returncode, answer.stderr)  # how much of it had gone is not known then, and not counted
        self._count(len(command) + size, len(answer.stdout))
        return answer

    def lines(self, command: str, silence_seconds: float, stdin: bytes = b"") -> Iterator[Line]:
        """Each line that a command prints, as it comes, without an end of the command itself.

        Raises MachineLost when the connection breaks or no line comes for `silence_seconds`, JobFailed where the command
        fails. Closing the iterator ends the connection.
        """
        self._open_master()
        errors: list[bytes] = []
        with tempfile.TemporaryFile() as asked:
            asked.write(stdin)
            asked.seek(0)
            process = self._spawn(command, asked)
            try:
                for line in read_lines(process, silence_seconds, errors):
                    self._count(0, line.size)
                    yield line
                code = process.wait(10)
            except Silence as error:
                raise MachineLost(f"{self.destination} has said nothing for {silence_seconds:g} s") from error
            except subprocess.TimeoutExpired as error:
                raise MachineLost(f"the connection to {self.destination} hangs") from error
            finally:
                _end(process)
        self._count(len(command) + len(stdin), 0)
        text = visible(b"".join(errors).decode(errors="replace"))
        self._check(code, text)
        if code:
            what = cut(text.strip(), _SAID_CHARS)
            raise JobFailed(f"{_short(command)} failed on {self.destination} with exit code {code}: {what}")

    def close(self) -> None:
        """End the kept connection, where there is one."""
        if self._socket.exists():
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    [*self._base(), "-O", "exit", "--", self.destination], capture_output=True, timeout=10, check=False
                )

    def _open_master(self) -> None:
        """Start the kept connection, if it isn't there: apart, since a master keeps the pipes of its parent open.

        One process at a time: an ssh that finds the socket taken while it logs in stays as an unused connection that
        nothing ever ends.
        """
        with self._lock, held(self._socket.with_suffix(".lock")):
            if self._socket.exists() and self._has_master():
                return
            with tempfile.TemporaryFile() as said:
                argv = [
                    *self._base(),
                    "-o",
                    f"ControlPersist={PERSIST_SECONDS}",
                    "-M",
                    "-N",
                    "-f",
                    "--",
                    self.destination,
                ]
                try:
                    done = subprocess.run(
                        argv,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=said,
                        timeout=CONNECT_SECONDS + 30,
                        check=False,
                        start_new_session=True,
                    )
                except subprocess.TimeoutExpired as error:
                    raise MachineLost(
                        f"{self.destination} has not let us in within {CONNECT_SECONDS + 30} s; try `ssh {self.destination}`"
                    ) from error
                said.seek(0)
                text = visible(said.read(STDERR_BYTES).decode(errors="replace"))
            # another process may have been first with the same socket
            if done.returncode and not self._socket.exists():
                raise self._refusal(text)

    def _has_master(self) -> bool:
        """Whether a process is behind the socket; a killed one leaves it, and it is in the way."""
        argv = [*self._base(), "-O", "check", "--", self.destination]
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs does not count
            if subprocess.run(argv, capture_output=True, timeout=CONNECT_SECONDS, check=False).returncode == 0:
                return True
        self._socket.unlink(missing_ok=True)
        return False

    @property
    def _socket(self) -> Path:
        """A short name: a socket's path has room for 104 characters."""
        mark = f"{self.destination}|{self._config}|{self._check_host_key}|{Path.home()}"
        return _socket_folder() / hashlib.sha256(mark.encode()).hexdigest()[:16]

    def _base(self) -> list[str]:
        options = dict(_OPTIONS)
        if self._check_host_key:
            options["StrictHostKeyChecking"] = "yes"
        file = ["-F", str(self._config)] if self._config else []
        return [
            "ssh",
            *file,
            *(part for name, value in options.items() for part in ("-o", f"{name}={value}")),
            "-o",
            f"ControlPath={self._socket}",
        ]

    def _argv(self, command: str) -> list[str]:
        return [*self._base(), "-o", "ControlMaster=no", "--", self.destination, in_sh(command)]

    def _spawn(self, command: str, stdin: int | IO[bytes]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        # a session of its own: Ctrl-C at the terminal is for us to handle, not for a half-sent file
        return subprocess.Popen(self._argv(command), stdin=stdin, stdout=pipe, stderr=pipe, start_new_session=True)

    def _count(self, sent: int, received: int) -> None:
        with self._lock:
            self.sent += sent
            self.received += received

    def _check(self, code: int, said: str) -> None:
        """Raises where the exit code is not the command's, but that of an ssh that has lost it."""
        if code == _LOST:
            raise self._refusal(said)
        if code < 0:
            raise MachineLost(f"the ssh to {self.destination} was ended by signal {-code}")

    def _refusal(self, said: str) -> HostRefused | MachineLost:
        """What ssh's own words mean, with what to do."""
        text, name = cut(" ".join(said.split()), _SAID_CHARS), self.destination
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
            return HostRefused(
                f"the host key of {name} is not the one that known_hosts has: another machine answers, or it was set up "
                f"anew. Nothing was sent. If you know why, remove the old key (ssh-keygen -R HOST) and log in once: ssh {name}"
            )
        if "Host key verification failed" in said or "host key is known for" in said:
            return HostRefused(
                f"the host key of {name} is not known here: log in once, compare the fingerprint and accept it: ssh {name}"
            )
        if "Permission denied" in said or "Too many authentication failures" in said:
            return HostRefused(
                f"{name} refuses our key ({text}): `ssh -o BatchMode=yes {name}` must work without a password; "
                "add your public key there (ssh-copy-id), or start ssh-agent"
            )
        return MachineLost(f"{name} can't be reached: {text or 'the connection broke'}")


def quote(argv: Sequence[str]) -> str:
    """A command line for the host's shell."""
    return shlex.join(argv)


def in_sh(command: str) -> str:
    """A command of a POSIX shell as one that any login shell hands on to `sh`, csh and fish too.

    These read quoted text otherwise: csh looks for `!` in it and ends it at a line's end, to fish a backslash means something.
    """
    if "\n" in command:
        coded = command.replace("\\", r"\\").replace("\n", r"\n")
        command = f'eval "$(printf %b {shlex.quote(coded)})"'
    return "sh -c '" + re.sub(r"(['!\\])", r"'\\\1'", command) + "'"


def _short(command: str) -> str:
    line = visible_line(" ".join(command.split()), 4096)
    return line if len(line) <= 120 else line[:117] + "..."


def _socket_folder() -> Path:
    """A folder that only this user can use, with a name that can't be guessed: the one that is there already, or a new one.

    It is known by its owner and its mode, and by no name: others may make what they like in /tmp, but nothing that is ours.
    """
    place, prefix = Path(tempfile.gettempdir()), f"{_SOCKETS}{os.getuid()}-"
    if len(f"{place}/{prefix}12345678") > 70:  # a long TMPDIR leaves no room for a socket's name
        place = Path("/tmp")
    if not _own_folders(place, prefix):
        tempfile.mkdtemp(prefix=prefix, dir=place)
    # asked again: of two that make one at once, both take the first
    if not (found := _own_folders(place, prefix)):
        raise BadInput(f"no folder for the sockets of ssh can be kept in {place}: set TMPDIR to one of your own")
    return found[0]


def _own_folders(place: Path, prefix: str) -> list[Path]:
    found: list[Path] = []
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    seen = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid() and not seen.st_mode & 0o077:
                        found.append(place / entry.name)
    return sorted(found)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End an ssh process and close its pipes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


def wait_for(connection: Connection, seconds: float) -> None:
    """Wait until the host answers. MachineLost after `seconds`, HostRefused at once."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.call("true", timeout_seconds=CONNECT_SECONDS)
        except (MachineLost, JobFailed) as error:
            if time.monotonic() >= deadline:
                raise MachineLost(f"{error}; waited {seconds:g} s for it") from error
            time.sleep(2)
        else:
            return
