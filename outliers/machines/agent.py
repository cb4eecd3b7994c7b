"""The program on a machine that answers questions over ssh: facts, lease, jobs, files.

    python -m outliers.machines.agent WORKSPACE VERB     one JSON object in, one JSON object out
    python -m outliers.machines.agent WORKSPACE follow FOLDER OFFSET     the lines of a job's stream, until it has ended
    python -m outliers.machines.agent WORKSPACE get PATH [NAME...]       a file or a folder's files, as a tar

Secrets come with standard input, as part of a job's environment, and go nowhere else. Imports nothing heavy: an answer
takes a tenth of a second. Errors of this project travel as {"error": {"kind", "message"}}.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.errors import BadInput, MachineLost, OutliersError
from outliers.files.atomic import NO_ROOM, sha256_file
from outliers.files.private import make_private
from outliers.files.records import read_json
from outliers.jobs import jobs
from outliers.jobs.jobs import JobSpec
from outliers.locks import try_lock
from outliers.machines import lease
from outliers.machines.local import LocalMachine
from outliers.names import nearest
from outliers.workspace import settle_host_folder

if TYPE_CHECKING:
    from outliers.workspace import Workspace

FOLLOW_SECONDS = 0.1
BUSY = 4
"""Exit code of `append`."""


def facts(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What the machine has, and which disk it is."""
    machine = LocalMachine(workspace)
    return {"facts": asdict(machine.facts()), "instance_id": machine.instance_id}


def hold(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Renew the lease; what `facts` says too, so that one call opens a machine."""
    if workspace.parent.name == lease.MACHINES:
        settle_host_folder(workspace.parent.parent)
    make_private(workspace)
    found = lease.hold(
        workspace, request["holder"], request["title"], request["seconds_held"], request.get("remove_files")
    )
    return _lease(found) | (facts(workspace, request) if request.get("facts") else {})


def leave(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """A holder is over."""
    return _lease(lease.leave(workspace, request["holder"], request.get("keep_seconds", 0.0)))


def release(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Nobody holds it any longer."""
    return _lease(lease.release(workspace))


def held(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The lease as it is, and what runs under it."""
    return _lease(lease.read(workspace)) | {"running": [handle.name for handle in jobs.running(workspace)]}


def _lease(found: lease.Lease) -> dict[str, Any]:
    left = {key: max(0.0, one["until"] - time.time()) for key, one in found.holders.items()}
    return {"left": found.left(), "holders": left}


def start(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Start a job, or find the one of that name that runs; MachineLost where the machine has no holder."""
    job = JobSpec(name=request["name"], argv=tuple(request["argv"]), env=request.get("env", {}))
    with lease.held(workspace):
        handle = jobs.start(workspace, job)
    return {"name": handle.name, "attempt": handle.attempt, "folder": str(handle.folder)}


def status(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """How a job stands."""
    return {"status": jobs.status(_job(request))}


def result(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """How a job that has ended went, and what it reported; its error is this answer's."""
    folder = _job(request)
    jobs.result(folder)
    return {"result": read_json(folder / "result.json")}


def _job(request: dict[str, Any]) -> Path:
    """The folder of a job; MachineLost where it is gone, as when a lease ended that takes its files along."""
    folder = Path(request["folder"])
    if not (folder / "job.json").exists():
        raise MachineLost(f"the job in {folder} is gone: its lease ended and its files were removed; start it again")
    return folder


def cancel(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """End a job."""
    return {"status": jobs.cancel(Path(request["folder"]), request.get("grace_seconds", 10.0))}


def size(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """How much of a file is here: whole, or the beginning that an interrupted upload has left."""
    place = workspace / request["path"]
    part = _part(place, request["sha256"])
    whole = place.is_file() and sha256_file(place) == request["sha256"]
    try:
        there = part.stat().st_size
    except FileNotFoundError:  # also where another upload of the same bytes has just given it its name
        there = 0
    return {"whole": whole, "part": there}


def settle(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Give an uploaded file its name, if it is what was sent. Of two uploads of the same bytes, one finds it done already."""
    place = workspace / request["path"]
    part = _part(place, request["sha256"])
    try:
        found = sha256_file(part)
        if found != request["sha256"]:
            part.unlink()
            raise MachineLost(f"{place.name} arrived with other bytes than were sent; it was removed, send it again")
        part.replace(place)
    except FileNotFoundError as error:
        if not place.is_file() or sha256_file(place) != request["sha256"]:
            raise MachineLost(f"{place.name} was removed while it was sent; send it again") from error
    return {}


def captures(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The captures of every machine below `workspace`, which is the folder of all of them."""
    from outliers.store.captures import list_captures

    found = [one for place in _workspaces(workspace) for one in list_captures(place)]
    return {"captures": [one.model_dump() for one in found]}


def remove_captures(workspace: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Remove captures by their ids, also those of workspaces below `workspace`; the bytes that each frees."""
    from outliers.store.captures import remove_capture

    removed: dict[str, int] = {}
    for name in request["names"]:
        places = [place for place in _workspaces(workspace) if place.capture(name).is_dir()]
        if not places:
            known = sorted({path.name for place in _workspaces(workspace) for path in place.captures.glob("*")})
            raise BadInput(
                f"there is no capture {name} on this host{nearest(name, known)}; there is: {', '.join(known) or 'none'}"
            )
        removed[name] = sum(remove_capture(place, name) for place in places)
    return {"removed": removed}


def _workspaces(folder: Path) -> list[Workspace]:
    from outliers.workspace import Workspace

    return [Workspace(path) for path in sorted(folder.glob("*")) if path.is_dir()]


def append(workspace: Path, path: str, sha256: str, begin: int) -> None:
    """Standard input goes behind the first `begin` bytes of a file, where they are all that is here.

    Exit code 4 where they are not: another upload is at work, or was.
    """
    part = _part(workspace / path, sha256)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        if not try_lock(file) or os.fstat(file.fileno()).st_size != begin:
            sys.exit(BUSY)
        while block := sys.stdin.buffer.read(1 << 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _part(place: Path, sha256: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise BadInput(f"'{sha256}' is not a sha256")
    return place.with_name(f".{place.name}.{sha256[:16]}.part")


def get(workspace: Path, path: str, names: list[str]) -> None:
    """A file, or a folder's files (those of `names`, if any), as a tar on standard output; exit code 3: there is nothing."""
    place = workspace / path
    if not place.exists():
        sys.exit(3)
    # dereference: of two names for one file the second would go as a link
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT, dereference=True) as archive:
        if place.is_file():
            archive.add(place, arcname="file", recursive=False)
            return
        for found in sorted(place / name for name in names) if names else sorted(place.rglob("*")):
            if found.is_file() and not found.is_symlink():
                archive.add(found, arcname=f"folder/{found.relative_to(place)}", recursive=False)


def follow(folder: Path, offset: int) -> None:
    """The stream of a job from a byte on, as it is written; the last line says how the job ended."""
    out, stream = sys.stdout.buffer, folder / "events.jsonl"
    while True:
        ended = jobs.status(folder) if (folder / "job.json").exists() else "lost"
        rest = b""
        if stream.exists():
            with stream.open("rb") as file:
                file.seek(offset)
                rest = file.read()
        whole = rest[: rest.rfind(b"\n") + 1]
        if whole:
            out.write(whole)
            out.flush()
            offset += len(whole)
        if ended != "running":
            out.write(json.dumps({"kind": "ended", "status": ended}).encode() + b"\n")
            out.flush()
            return
        time.sleep(FOLLOW_SECONDS)


VERBS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    action.__name__: action
    for action in (
        facts,
        hold,
        leave,
        release,
        held,
        start,
        status,
        result,
        cancel,
        size,
        settle,
        captures,
        remove_captures,
    )
}


def main(argv: list[str]) -> int:
    """Answer one question; the exit code is 0 also for an error of this project, which is in the answer."""
    workspace, verb, *rest = argv
    root = Path(workspace)
    if verb == "follow":
        follow(Path(rest[0]), int(rest[1]))
    elif verb == "get":
        get(root, rest[0], rest[1:])
    elif verb == "append":
        append(root, rest[0], rest[1], int(rest[2]))
    else:
        try:
            answer = VERBS[verb](root, json.loads(sys.stdin.buffer.read() or b"{}"))
        except OutliersError as error:
            answer = {"error": {"kind": type(error).__name__, "message": str(error)}}
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            answer = {"error": {"kind": "DiskFull", "message": f"the disk of {root} takes no more ({error.strerror})"}}
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
