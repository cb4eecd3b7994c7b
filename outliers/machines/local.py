"""Provider `local`: this computer, at no price, with real detached jobs.

It knows nothing of renting: nothing is made by `ensure` and nothing is ended by `release`. GPUs are asked of
nvidia-smi, not of torch, whose import takes seconds and a context on every card.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from outliers.errors import BadInput, JobFailed, PlanRefused, WorkspaceError
from outliers.events.event import Event
from outliers.files.atomic import size_of, temporary_for, write_new
from outliers.files.private import make_private
from outliers.hardware import Facts, find_gpus, free_ram_bytes, total_ram_bytes
from outliers.jobs import jobs
from outliers.jobs.jobs import JobHandle, JobSpec, Status
from outliers.machines.base import Completed, Excluded, Machine, MachineRequest, Offer, Rental, fits
from outliers.names import LOCAL
from outliers.untrusted.bounds import RECEIVED_BYTES, RECEIVED_FILES

_ID = re.compile(rb"[0-9a-f]{32}")

_log = logging.getLogger(__name__)


def instance_id(workspace: Path) -> str:
    """The id of the disk that `workspace` is on: random, made once; WorkspaceError where it can't be written."""
    path = workspace / "instance"
    try:
        make_private(workspace)
        if path.exists() and _ID.fullmatch(path.read_bytes()) is None:
            # damaged: with another id what was remembered of this disk is asked for again
            path.unlink()
        if not path.exists():
            draft = temporary_for(path)
            write_new(draft, uuid.uuid4().hex.encode())
            try:
                # Unlike a rename, a link leaves the id of another process that was faster.
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
            finally:
                draft.unlink()
        return path.read_text()
    except OSError as error:
        raise WorkspaceError(
            f"the workspace {workspace} can't be used: {error}; name another with --workspace"
        ) from error


class LocalMachine:
    """This computer; `workspace` need not exist yet."""

    provider = LOCAL
    price_per_hour = 0.0
    # -P: a file called json.py in the folder where the command was typed must not shadow a module.
    python: tuple[str, ...] = (sys.executable, "-P")

    def __init__(self, workspace: Path, name: str = LOCAL, nvidia_smi: str = "nvidia-smi") -> None:
        self.name = name
        self._root = workspace.expanduser().absolute()
        self._nvidia_smi = nvidia_smi

    @property
    def workspace(self) -> str:
        return str(self._root)

    @property
    def shared(self) -> str:
        return str(self._root)

    @property
    def provenance(self) -> dict[str, str | int | float]:
        return {"provider": self.provider, "price_per_hour": self.price_per_hour}

    @property
    def instance_id(self) -> str:
        return instance_id(self._root)

    def facts(self) -> Facts:
        existing = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        return Facts(
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            ram_bytes=total_ram_bytes(),
            ram_available_bytes=free_ram_bytes(),
            disk_free_bytes=shutil.disk_usage(existing).free,
            gpus=find_gpus(self._nvidia_smi, os.environ.get("CUDA_VISIBLE_DEVICES")),
            python=platform.python_version(),
        )

    def run(self, argv: Sequence[str], timeout_seconds: float) -> Completed:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True, errors="replace"
            )
        except (OSError, ValueError) as error:
            raise JobFailed(f"{argv[0]} can't be run: {error}") from error
        try:
            stdout, stderr = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise JobFailed(f"{argv[0]} took longer than {timeout_seconds:g} s and was ended") from error
        finally:
            # Also on Ctrl-C: its own session did not get that. Once it was waited for, its number may be another's.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return Completed(process.returncode, stdout, stderr)

    def upload(self, local: Path, remote: str) -> None:
        _copy(local, self._root / remote, _files(local))

    def download(
        self,
        remote: str,
        local: Path,
        *,
        max_bytes: int = RECEIVED_BYTES,
        max_files: int = RECEIVED_FILES,
        names: Collection[str] | None = None,
    ) -> None:
        source = self._root / remote
        files = [path for path in _files(source) if names is None or path == source or _name(path, source) in names]
        size = sum(map(size_of, files))
        if len(files) > max_files or size > max_bytes:
            raise JobFailed(
                f"{remote} on {self.name} has {size:,} bytes in {len(files):,} files, too much to be results: at most "
                f"{max_bytes:,} in {max_files:,}"
            )
        _copy(source, local, files)

    def start(self, job: JobSpec) -> JobHandle:
        return jobs.start(self._root, job)

    def follow(self, handle: JobHandle, offset: int = 0) -> Iterator[Event]:
        return jobs.follow(handle.folder, offset)

    def status(self, handle: JobHandle) -> Status:
        return jobs.status(handle.folder)

    def result(self, handle: JobHandle) -> None:
        jobs.result(handle.folder)

    def cancel(self, handle: JobHandle, grace_seconds: float = 10.0) -> Status:
        return jobs.cancel(handle.folder, grace_seconds)


def _files(source: Path) -> list[Path]:
    """The file, or a folder's files; BadInput where there is neither."""
    if not source.exists():
        raise BadInput(f"there is nothing to copy at {source}")
    return [path for path in sorted(source.rglob("*")) if path.is_file()] if source.is_dir() else [source]


def _name(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix()


def _copy(source: Path, target: Path, files: list[Path]) -> None:
    """A file or a folder's files, each appearing whole; onto itself: nothing."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    for path in files:
        place = target / path.relative_to(source) if path != source else target
        if place.exists() and place.samefile(path):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = temporary_for(place)
        try:
            shutil.copyfile(path, draft)
            draft.replace(place)
        finally:
            draft.unlink(missing_ok=True)


class LocalProvider:
    """This computer, under any name: names only distinguish rented machines."""

    def __init__(self, workspace: Path, nvidia_smi: str = "nvidia-smi") -> None:
        self._workspace = workspace
        self._nvidia_smi = nvidia_smi

    def _machine(self, name: str) -> LocalMachine:
        return LocalMachine(self._workspace, name, self._nvidia_smi)

    def offers(self, request: MachineRequest) -> tuple[tuple[Offer, ...], tuple[Excluded, ...]]:
        facts = self._machine(LOCAL).facts()
        if reasons := fits(facts, request):
            return (), (Excluded(LOCAL, "; ".join(reasons)),)
        return (Offer(LOCAL, LOCAL, facts, 0.0),), ()

    def ensure(self, name: str, request: MachineRequest, holder: str, title: str) -> Machine:
        machine = self._machine(name)
        if reasons := fits(machine.facts(), request):
            raise PlanRefused(f"this machine does not fit: {'; '.join(reasons)}")
        return machine

    def find(self, name: str) -> Machine | None:
        return self._machine(name)

    def list(self) -> tuple[Rental, ...]:
        return ()

    def hold(self, name: str, holder: str, title: str, seconds: float) -> None:
        """Nothing: this computer is not rented."""

    def leave(self, name: str, holder: str, keep_seconds: float = 0, wait: bool = True) -> str:
        return self.release(name)

    def release(self, name: str) -> str:
        return f"{name} is this computer, which is not rented: there is nothing to release"
