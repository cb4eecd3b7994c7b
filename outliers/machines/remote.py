"""A machine that is reached over ssh, rented or not: jobs that outlive the connection, files, the lease.

The program is there already (`deploy`); each call is one question to `outliers.machines.agent` on that machine. What is
asked may be asked again, so a call whose connection broke is repeated for a while; a stream of events goes on after the
last byte that came. Knows no study.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from outliers.errors import BadInput, DiskFull, JobFailed, MachineGone, MachineLost
from outliers.events import stream as events
from outliers.events.event import Event
from outliers.files.atomic import sha256_file
from outliers.hardware import Facts
from outliers.jobs.jobs import JobHandle, JobSpec, Status
from outliers.machines.answers import parse_answer, read_facts
from outliers.machines.archive import Limits, unpack
from outliers.machines.base import Completed
from outliers.machines.connection import Answer, Connection, quote
from outliers.machines.deploy import Deployment, last_line
from outliers.untrusted.bounds import RECEIVED_BYTES, RECEIVED_FILES

PATIENCE_VARIABLE = "OUTLIERS_PATIENCE_SECONDS"
"""For how long a host that doesn't answer is tried again before its machine is given up for lost."""
PATIENCE_SECONDS = 120.0
CALL_SECONDS = 60.0
CANCEL_SECONDS = 60.0
SILENCE_SECONDS = 45.0
"""A job's heartbeats come every 5 s: a stream without any is broken, whatever the connection believes."""
TRANSFER_SECONDS = 86_400.0
SMALL_BYTES = 1 << 20
LAST_SIGNAL = 64
BUSY = 4
"""Of `agent append`: another upload of the same file is at work, or has changed what is there."""
DOWNLOAD_SECONDS = 600.0
DOWNLOAD_RATE = 1_000_000.0
"""Bytes a second, at least, of what is brought home beyond what comes in DOWNLOAD_SECONDS: a summary with the sums of a large
mixture's experts is gigabytes. Chosen: 8 Mbit/s, which a home's connection has."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def patience_seconds() -> float:
    """$OUTLIERS_PATIENCE_SECONDS, else two minutes."""
    return float(os.environ.get(PATIENCE_VARIABLE) or PATIENCE_SECONDS)


def download_seconds(most_bytes: int) -> float:
    """For how long a download may run that brings at most so many bytes."""
    return max(DOWNLOAD_SECONDS, most_bytes / DOWNLOAD_RATE)


class RemoteMachine:
    """A machine over ssh; `workspace` is a full path there, and `instance_id` that of its disk when it was opened."""

    def __init__(
        self,
        *,
        name: str,
        provider: str,
        connection: Connection,
        deployment: Deployment,
        root: str,
        workspace: str,
        price_per_hour: float,
        instance_id: str,
        lease_left: Callable[[], float],
    ) -> None:
        self.name = name
        self.provider = provider
        self.connection = connection
        self.deployment = deployment
        self.root = root
        self.workspace = workspace
        self.price_per_hour = price_per_hour
        self.instance_id = instance_id
        self.python = deployment.python
        self._lease_left = lease_left

    @property
    def shared(self) -> str:
        return self.root

    @property
    def provenance(self) -> dict[str, str | int | float]:
        return {
            "provider": self.provider,
            "price_per_hour": self.price_per_hour,
            "sent_bytes": self.connection.sent,
            "received_bytes": self.connection.received,
            "wheel": self.deployment.wheel,
            "deployed": self.deployment.how,
            "deploy_seconds": self.deployment.seconds,
        }

    def ask(self, verb: str, *, seconds: float = CALL_SECONDS, patient: bool = True, **request: Any) -> dict[str, Any]:
        """One question to the agent; raises the error that it answers with, MachineLost where it is silent."""
        command = quote([*self.python, "-m", "outliers.machines.agent", self.workspace, verb])
        text = json.dumps(request).encode()

        def once() -> Answer:
            return self.connection.call(command, text, seconds)

        done = self._patiently(once) if patient else once()
        # outside of the patience: a job that was lost is an answer, and no connection that may mend
        asked = f"{verb} facts" if request.get("facts") else verb
        return parse_answer(asked, done.returncode, done.stdout, done.stderr, self.connection.destination)

    def facts(self) -> Facts:
        return read_facts(self.ask("facts")["facts"])

    def run(self, argv: Sequence[str], timeout_seconds: float) -> Completed:
        # what runs there is ended there: an ssh that is killed leaves its command behind
        command = quote(["timeout", "-k", "5", str(timeout_seconds), *argv])
        # ssh says 255 when the connection broke: a command's own 255 arrives as 254
        command += "; code=$?; [ $code = 255 ] && code=254; exit $code"
        done = self._patiently(lambda: self.connection.call(command, timeout_seconds=timeout_seconds + CALL_SECONDS))
        if done.returncode == 124:
            raise JobFailed(f"{argv[0]} took longer than {timeout_seconds:g} s on {self.name} and was ended")
        if done.returncode in (126, 127):
            raise JobFailed(f"{argv[0]} can't be run on {self.name}: {last_line(done.text())}")
        code = done.returncode
        # a shell reports a signal as 128 plus its number; greater codes are the program's own
        code = 128 - code if 128 < code <= 128 + LAST_SIGNAL else code
        return Completed(code, done.stdout.decode(errors="replace"), done.stderr)

    def upload(self, local: Path, remote: str) -> None:
        if not local.exists():
            raise BadInput(f"there is nothing to copy at {local}")
        files = [path for path in sorted(local.rglob("*")) if path.is_file()] if local.is_dir() else [local]
        for path in files:
            place = f"{remote}/{path.relative_to(local)}" if path != local else remote
            self._send(path, place)

    def _send(self, path: Path, place: str) -> None:
        """One file, from where an interrupted upload of the same bytes stopped; nothing where it is there already."""
        sha256 = sha256_file(path)

        def once() -> None:
            there = self.ask("size", seconds=600, patient=False, path=place, sha256=sha256)
            if there["whole"]:
                return
            begin = str(min(there["part"], path.stat().st_size))
            command = quote(
                [*self.python, "-m", "outliers.machines.agent", self.workspace, "append", place, sha256, begin]
            )
            if there["part"]:
                _log.info("sending %s to %s, from %.1f MB on", path.name, self.name, there["part"] / 1e6)
            elif path.stat().st_size > SMALL_BYTES:
                _log.info("sending %s to %s (%.1f MB)", path.name, self.name, path.stat().st_size / 1e6)
            done = self.connection.send(command, path, int(begin), TRANSFER_SECONDS)
            if done.returncode == BUSY:
                raise MachineLost(f"{path.name} is being sent to {self.name} by another process, or was until just now")
            if done.returncode:
                raise JobFailed(f"{path.name} could not be written on {self.name}: {last_line(done.text())}")
            self.ask("settle", seconds=600, patient=False, path=place, sha256=sha256)

        self._patiently(once)

    def download(
        self,
        remote: str,
        local: Path,
        *,
        max_bytes: int = RECEIVED_BYTES,
        max_files: int = RECEIVED_FILES,
        names: Collection[str] | None = None,
    ) -> None:
        limits, what = Limits(max_bytes, max_files, names), f"{remote} on {self.name}"
        asked = sorted(names) if names is not None else []
        command = quote([*self.python, "-m", "outliers.machines.agent", self.workspace, "get", remote, *asked])

        def once() -> None:
            with tempfile.TemporaryFile() as archive:
                done = self.connection.receive(
                    command, archive, limits.archive_bytes, download_seconds(limits.archive_bytes)
                )
                if done.returncode == 3:
                    raise BadInput(f"there is nothing at {remote} on {self.name}")
                if done.returncode:
                    raise JobFailed(f"{remote} can't be read on {self.name}: {last_line(done.text())}")
                archive.seek(0)
                unpack(archive, local, limits, what)

        self._patiently(once)

    def start(self, job: JobSpec) -> JobHandle:
        made = self.ask("start", name=job.name, argv=list(job.argv), env=dict(job.env), seconds=120)
        home = Path(self.workspace, "jobs", job.name)
        folder = Path(made["folder"])
        if made["name"] != job.name or folder.parent != home:
            raise JobFailed(
                f"{self.connection.destination} started '{made['name']}' in {folder}, not {job.name} in {home}"
            )
        return JobHandle(job.name, made["attempt"], folder)

    def follow(self, handle: JobHandle, offset: int = 0) -> Iterator[Event]:
        """As the protocol says; a broken connection is made again and the stream goes on where it broke."""
        broken_since: float | None = None
        while True:
            command = quote(
                [
                    *self.python,
                    "-m",
                    "outliers.machines.agent",
                    self.workspace,
                    "follow",
                    str(handle.folder),
                    str(offset),
                ]
            )
            try:
                for line in self.connection.lines(command, SILENCE_SECONDS):
                    if broken_since is not None:
                        _log.info("%s answers again after %.0f s", self.name, time.monotonic() - broken_since)
                        broken_since = None
                    if line.data.startswith(b'{"kind": "ended"'):
                        return
                    offset += line.size
                    yield from events.parse_line(line.data, offset)
                raise MachineLost(f"the stream of {handle.name} on {self.name} broke off")
            except MachineLost as error:
                now = time.monotonic()
                if broken_since is None:
                    broken_since = now
                    _log.warning("%s; the job goes on there, it is tried again for %.0f s", error, patience_seconds())
                elif now - broken_since > patience_seconds():
                    raise self._lost(error, now - broken_since) from error
                time.sleep(1.0)

    def status(self, handle: JobHandle) -> Status:
        found: Status = self.ask("status", folder=str(handle.folder))["status"]
        return found

    def result(self, handle: JobHandle) -> None:
        while self.status(handle) == "running":
            time.sleep(0.5)
        try:
            self.ask("result", folder=str(handle.folder))
        except DiskFull as error:
            raise DiskFull(f"{self.name} ({self.connection.destination}): {error}") from error

    def cancel(self, handle: JobHandle, grace_seconds: float = 10.0) -> Status:
        seconds = CANCEL_SECONDS + grace_seconds
        found: Status = self.ask(
            "cancel", folder=str(handle.folder), grace_seconds=grace_seconds, seconds=seconds, patient=False
        )["status"]
        return found

    def _patiently(self, once: Callable[[], _T]) -> _T:
        """What may be asked again is, until the host answers or patience ends."""
        began, said = time.monotonic(), False
        while True:
            try:
                return once()
            except MachineLost as error:
                waited = time.monotonic() - began
                if waited > patience_seconds():
                    raise self._lost(error, waited) from error
                if not said:
                    _log.warning("%s; it is tried again for %.0f s", error, patience_seconds())
                    said = True
                time.sleep(1.0)

    def _lost(self, error: MachineLost, seconds: float) -> MachineGone:
        return MachineGone(
            f"machine {self.name} ({self.connection.destination}) has not answered for {seconds:.0f} s: {error}. "
            f"Its lease {self._lease()}. What is journaled there stays as long as its disk: Retry goes on from it, or begins "
            "on another machine"
        )

    def _lease(self) -> str:
        left = self._lease_left()
        return f"ends by itself in {left / 60:.0f} minutes" if left > 0 else "is over"
