"""This very program as one wheel, made in a moment and named by its content, and what it must be installed with.

The wheel is written from the files that run here, so that a machine runs the same; the same files give the same bytes and
name, so a machine that has it needs nothing. Only `outliers` is in it: flows and tasks stay on this computer.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from outliers import version
from outliers.errors import DeployFailed

DISTRIBUTION = "outlier-features"
EXTRAS = ("demo",)
"""Of the extras, what a machine is given too: a GGUF file is read there."""
LISTS = {"constraints.txt": "hashes.txt", "constraints-latest.txt": "hashes-latest.txt"}
"""Versions of a checkout and their hashes: with SkyPilot, and the newest without it (constraints.in)."""
_STEM = "outlier_features"
_DATE = (1980, 1, 1, 0, 0, 0)
CONTROL = ("api", "atlas", "dispatch", "export", "planning", "sweep")
"""Packages that a machine never runs: a contract of imports holds it. They stay on this side."""
_KEPT = (".py", ".typed", ".html")


@dataclass(frozen=True, slots=True)
class Wheel:
    """`sha256` of `data`; `name` is the file's, as packaging rules want it."""

    name: str
    sha256: str
    data: bytes

    @property
    def key(self) -> str:
        """What it is called by on a machine."""
        return self.sha256[:16]


def build_wheel(more: Mapping[str, bytes] | None = None) -> Wheel:
    """The wheel of what runs here, less CONTROL, and of `more` files by their names in it; the same files give the same bytes.

    Raises DeployFailed where a file can't be read.
    """
    root = version.FOLDER
    try:
        files = {
            f"outliers/{path.relative_to(root).as_posix()}": path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix in _KEPT and "__pycache__" not in path.parts
            if path.relative_to(root).parts[0] not in CONTROL
        }
    except OSError as error:
        raise DeployFailed(f"this program's own files can't be read: {error}") from error
    files |= more or {}
    info = f"{_STEM}-{_version()}.dist-info"
    files |= {
        f"{info}/METADATA": _metadata().encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: outliers\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_urlsafe(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # no clock and no user in it: the name is the content
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    data = buffer.getvalue()
    return Wheel(f"{_STEM}-{_version()}-py3-none-any.whl", hashlib.sha256(data).hexdigest(), data)


def requirements() -> tuple[str, ...]:
    """What the wheel requires, as requirement lines, with the markers of extras resolved."""
    found = []
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        extra = re.search(r'extra\s*==\s*[\'"]([\w.-]+)[\'"]', line)
        if extra is None:
            found.append(line)
        elif extra[1] in EXTRAS:
            found.append(line.partition(";")[0].strip())
    return tuple(sorted(found))


def names() -> tuple[str, ...]:
    """The names alone of `requirements`."""
    return tuple(re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in requirements())


def constraints() -> tuple[str, ...]:
    """Versions that everything is held to: the list of a checkout with its hashes (`LISTS`), else what is installed here,
    without."""
    if lock := _list_here():
        hashed = _hashes(lock.with_name(LISTS[lock.name]))
        return tuple(sorted(" ".join((line, *hashed.get(line, ()))) for line in _pinned(lock)))
    seen: dict[str, str] = {}
    waiting = list(names())
    while waiting:
        name = waiting.pop()
        if _plain(name) in seen:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system, or of an extra that is not installed here
        # a build for one kind of processor has a local label, which no other machine need have
        seen[_plain(name)] = f"{name}=={found.version.partition('+')[0]}"
        waiting += [
            re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in found.requires or () if "extra ==" not in line
        ]
    return tuple(sorted(seen.values()))


def _list_here() -> Path | None:
    """The list of a checkout that has this environment's transformers, so that a host computes with the same; else the
    first. None without a checkout."""
    folder = version.FOLDER.parent
    there = [folder / name for name in LISTS if (folder / name).is_file()]
    ours = f"transformers=={importlib.metadata.version('transformers')}"
    return next((path for path in there if ours in _pinned(path)), there[0] if there else None)


def _pinned(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _hashes(path: Path) -> dict[str, tuple[str, ...]]:
    """`name==version` -> its `--hash=sha256:...`, which uv compares with what it downloads.

    None for torch and what comes with it: an index of its own serves other files of the same version.
    """
    if not path.is_file():
        return {}
    joined = path.read_text("utf-8").replace("\\\n", " ").splitlines()
    entries = [line.partition("#")[0].split() for line in without_torch(tuple(joined))]
    return {words[0]: tuple(word for word in words if word.startswith("--hash=sha256:")) for words in entries if words}


def without_torch(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Requirements or constraints for a machine whose image brings its own torch and CUDA."""

    def brought(line: str) -> bool:
        name = re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0]
        return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))

    return tuple(line for line in lines if not brought(line))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version() -> str:
    return version.__version__


def _metadata() -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {DISTRIBUTION}", f"Version: {_version()}", "Requires-Python: >=3.11"]
    return "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requirements())]) + "\n"


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
