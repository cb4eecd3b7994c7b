"""Checks that a GGUF file is whole before it is hashed or read: what its table lists, and whether all of it is there.

It reads the metadata and the list of tensors, no weight.
"""

from __future__ import annotations

from pathlib import Path

from outliers.errors import UnknownModel
from outliers.hub.headers import named, refuse_pointer
from outliers.model.configs import MOST
from outliers.model.foreign import foreign

_AGAIN = "fetch or copy it again"


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file that is cut off, is a pointer of git-lfs, or lacks whole layers. Raises UnknownModel."""
    with foreign(f"{path} can't be read"), path.open("rb") as file:
        begin = file.read(24)
    refuse_pointer(path, begin)
    if not begin.startswith(b"GGUF"):
        raise UnknownModel(f"{path} is not a GGUF file; a model is a hub id, a folder, a .gguf file or builtin:smollm2")
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    with foreign(f"{path} is cut off, or is not a GGUF file that can be read; {_AGAIN}"):
        header = GgufHeader.from_file(str(path))
        metadata, _ = read_gguf_metadata(str(path))
        needed = header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
        size = path.stat().st_size
    if not header.tensors:
        raise UnknownModel(f"{path} holds no tensor: {_AGAIN}")
    if needed > size:
        raise UnknownModel(f"{path} is cut off: its table names {needed:,} bytes, {size:,} are here: {_AGAIN}")
    _check_layers(path, metadata.get(f"{header.architecture}.block_count"), {tensor.name for tensor in header.tensors})


def _check_layers(path: Path, count: object, names: set[str]) -> None:
    most = MOST["num_hidden_layers"]
    if type(count) is not int or not 1 <= count <= most:
        raise UnknownModel(
            f"{path} says that it has {count!r:.40} layers, which is not a number from 1 to {most:,}: {_AGAIN}"
        )
    there = {name.split(".")[1] for name in names if name.startswith("blk.")}
    missing = [f"blk.{number}" for number in range(count) if str(number) not in there]
    if missing:
        raise UnknownModel(f"{path} lacks {len(missing)} of its {count} layers, first {named(missing)}: {_AGAIN}")
