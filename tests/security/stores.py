"""What stands in a store where a small regular file is expected, and a clock for a reader that may hang."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SECONDS = 60


def in_time(do: Callable[[], Any]) -> Any:
    """What `do` gives, or raises; a test that hangs fails."""
    said: list[Any] = []

    def run() -> None:
        try:
            said.append((True, do()))
        except BaseException as error:  # noqa: BLE001 - it is raised below, in the test's own thread
            said.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert said, "it hangs"
    done, value = said[0]
    if not done:
        raise value
    return value


def _large(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(6_000_000_000)  # sparse: it takes no disk


def _bind(path: Path) -> None:
    path.unlink()
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:  # by a short name
        one.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def _instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        make(path)

    return put


# what stands where a small regular file is expected, and what is said of it
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (_instead(os.mkfifo), "a pipe, not a regular file"),
    "a link to a device": (
        _instead(lambda path: path.symlink_to("/dev/zero")),
        "a symbolic link, which is not followed",
    ),
    "a link to itself": (_instead(lambda path: path.symlink_to(path.name)), "a symbolic link, which is not followed"),
    "a link to a file": (
        _instead(lambda path: path.symlink_to("/etc/passwd")),
        "a symbolic link, which is not followed",
    ),
    "a socket": (_bind, "not a regular file"),
    "a folder": (_instead(Path.mkdir), "a folder, not a regular file"),
    "six gigabytes": (_large, "6,000,000,000 bytes, at most"),
}


def publish_raw(place: Path, put: dict[str, bytes], others: dict[str, bytes]) -> None:
    """Files as a hostile publisher puts them: with a manifest that names them as they are."""
    import hashlib

    manifest = json.loads(put["manifest.json"])
    named = {item["path"]: item for item in manifest["files"]}
    for path, data in others.items():
        named[path] = {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        put[f"{manifest['folder']}/{path}"] = data
    manifest["files"] = list(named.values())
    put["manifest.json"] = json.dumps(manifest).encode()
    for path, data in put.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(data)


def dump(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", **options})
    return bytes(sink.getvalue())
