"""capture.json: the conditions under which a capture began, and its layout; with a checksum, since a resumed capture obeys it.

Knows the file and its format, not the conditions: `capture.extract` names and compares them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32 as crc32_of

from outliers.errors import CaptureMismatch, CorruptCapture
from outliers.files.atomic import write_atomic
from outliers.spec import FORMAT_VERSION
from outliers.study.expert_shapes import ExpertShapes
from outliers.study.layout import Layout


def shapes_of(layout: Layout) -> dict[str, Any]:
    """A Layout as JSON values; `layout_from` reads it."""
    shapes = dict(layout.__dict__)
    experts = shapes.pop("experts")
    return shapes if experts is None else shapes | {"experts": asdict(experts)}


def layout_from(fingerprint: dict[str, Any]) -> Layout:
    """The Layout that a fingerprint describes."""
    stored = fingerprint["layout"]
    return Layout(
        widths={str(k): int(v) for k, v in stored["widths"].items()},
        layers=tuple(stored["layers"]),
        num_sequences=stored["num_sequences"],
        positions=stored["positions"],
        dtype=stored["dtype"],
        codec=stored["codec"],
        chunk_bytes=stored["chunk_bytes"],
        aliases=dict(stored.get("aliases", {})),
        experts=_experts_from(stored.get("experts")),
    )


def _experts_from(stored: dict[str, Any] | None) -> ExpertShapes | None:
    if stored is None:
        return None
    lists = {name: tuple(stored[name]) for name in ("layers", "shared_widths")}
    return ExpertShapes(**(stored | lists))


def difference(found: dict[str, Any], fixed: dict[str, Any]) -> str | None:
    """How the conditions of a fingerprint differ from `fixed`; None if they don't.

    A condition that the fingerprint lacks is not a difference, since the first captures recorded fewer; but if that version
    looked for it (`looked_for`), it was absent.
    """
    before, looked_for = found["fixed"], found.get("looked_for", [])
    for name in dict.fromkeys((*fixed, *looked_for)):
        if name not in before and name not in looked_for:
            continue
        old, new = before.get(name), fixed.get(name)
        if old != new:
            absent = name in looked_for
            begun = f"without {name}" if old is None and absent else f"with {name} {old}"
            return f"{begun}, now {'it is not here' if new is None and absent else f'it is {new}'}"
    return None


def write_fingerprint(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Write capture.json, with a checksum: otherwise a resumed capture would obey a changed thread count or shape."""
    content = fingerprint | {"crc32": _content_crc(fingerprint)}
    write_atomic(folder / "capture.json", json.dumps(content, indent=1, sort_keys=True).encode())


def _content_crc(fingerprint: dict[str, Any]) -> int:
    body = {key: value for key, value in fingerprint.items() if key != "crc32"}
    return crc32_of(json.dumps(body, sort_keys=True).encode())


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """capture.json, or None if there is no capture; the first captures have no checksum.

    Raises CorruptCapture, and CaptureMismatch for a newer format.
    """
    path = folder / "capture.json"
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        version, crc = int(found["fixed"]["format"]), int(found.get("crc32", _content_crc(found)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCapture(
            f"{path} is not a capture's description: `outliers captures rm {folder.name}` and extract again"
        ) from error
    if version > FORMAT_VERSION:
        raise CaptureMismatch(f"{folder} has format {version}, this version reads up to {FORMAT_VERSION}: upgrade")
    if crc != _content_crc(found):
        raise CorruptCapture(
            f"{path} has changed: its content has checksum {_content_crc(found):08x}, it was written with {crc:08x}; put it "
            f"back, or `outliers captures rm {folder.name}` and extract again"
        )
    return found
