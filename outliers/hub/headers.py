"""The safetensors files of a checkpoint: name, dtype, shape and place of each tensor, from the headers.

It reads a few kilobytes a file and no weight, so that a file that is cut off, is a git-lfs pointer, or is named by an index
and missing is refused in seconds. Format: safetensors' own description (8 bytes of length, JSON, data without gaps).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from outliers.errors import UnknownModel
from outliers.hub.files import INDEX, WEIGHTS_SUFFIX, WHOLE

MAX_HEADER_BYTES = 100_000_000
"""safetensors itself reads no longer header."""

BITS = {
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""dtype in a header -> bits of one value."""

_LFS = b"version https://git-lfs"
_AGAIN = "fetch or copy it again"


class Tensor(NamedTuple):
    """One tensor of a checkpoint: its dtype as safetensors names it, its shape, its bytes, the file it is in, and where they
    begin there."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int = 0


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, by its name. Raises UnknownModel for anything that is not whole."""
    single = folder / WHOLE
    if single.is_file():
        found = read_header(single)
    elif (folder / INDEX).is_file():
        found = _read_shards(folder)
    else:
        there = sorted(path.name for path in folder.glob(f"*{WEIGHTS_SUFFIX}"))
        holds = f", only {named(there)}" if there else ""
        raise UnknownModel(f"{folder} has neither {WHOLE} nor {INDEX}{holds}: transformers reads no other name")
    if not found:
        raise UnknownModel(f"the weights in {folder} hold no tensor: {_AGAIN}")
    return found


def _read_shards(folder: Path) -> dict[str, Tensor]:
    places = read_weight_map(folder / INDEX)
    files = sorted(set(places.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UnknownModel(
            f"{folder / INDEX} names {len(files)} files, and {len(missing)} of them are not there, first {named(missing)}: "
            "fetch or copy them too"
        )
    found: dict[str, Tensor] = {}
    for name in files:
        shard = read_header(folder / name)
        twice = sorted(found.keys() & shard.keys())
        if twice:
            raise UnknownModel(
                f"{named(twice)} is in {found[twice[0]].file.name} and in {name} of {folder}: one of them is of another "
                "checkpoint"
            )
        found.update(shard)
    absent = [key for key, name in places.items() if key not in found or found[key].file.name != name]
    if absent:
        raise UnknownModel(
            f"{folder / INDEX} names {len(absent)} weights that are not in the file it says, first {named(absent)}: the "
            "files are of another checkpoint than the index; fetch or copy all of them again"
        )
    return found


def read_weight_map(index: Path) -> dict[str, str]:
    """Name of each weight -> the file it is in, of an index. Raises UnknownModel."""
    content = read_json(index)
    if not isinstance(content.get("metadata"), dict):
        raise UnknownModel(
            f'{index} has no metadata, which transformers needs: add "metadata": {{}} next to its weight_map'
        )
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UnknownModel(f"{index} has no weight_map of names to files: {_AGAIN}")
    outside = [name for name in places.values() if "/" in name or "\\" in name or name in ("", ".", "..")]
    if outside:
        raise UnknownModel(f"{index} names the file '{outside[0]}', which is not one of its own folder")
    return places


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file; UnknownModel where it holds anything else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnknownModel(f"{path} can't be read: {error.strerror}") from error
    refuse_pointer(path, data[: len(_LFS)])
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnknownModel(f"{path} is not UTF-8 text (byte {error.start}): {_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise UnknownModel(f"{path} is not JSON ({str(error)[:100]}): {_AGAIN}") from error
    if not isinstance(content, dict):
        raise UnknownModel(f"{path} holds a JSON {type(content).__name__}, not an object of names and values: {_AGAIN}")
    return content


def refuse_pointer(path: Path, begin: bytes) -> None:
    """Raises UnknownModel where a file begins as the pointers do that git-lfs leaves in the place of large files."""
    if begin.startswith(_LFS):
        raise UnknownModel(
            f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in {path.parent}, then try again"
        )


def read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, by its name. Raises UnknownModel where header and file don't agree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(len(_LFS))
            refuse_pointer(path, begin)
            length = int.from_bytes(begin[:8], "little")
            if size < 8 or length > MAX_HEADER_BYTES or length < 2:
                raise UnknownModel(
                    f"{path} is not a safetensors file, or only its beginning ({size:,} bytes): {_AGAIN}"
                )
            if 8 + length > size:
                raise UnknownModel(
                    f"{path} is cut off: its header alone takes {8 + length:,} bytes, {size:,} are here: {_AGAIN}"
                )
            file.seek(8)
            header = _parse(path, file.read(length))
    except OSError as error:
        raise UnknownModel(f"{path} can't be read: {error.strerror}") from error
    return _tensors(path, header, 8 + length, size - 8 - length)


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise UnknownModel(f"the header of {path} names a tensor twice: {_AGAIN}")
        return dict(pairs)

    try:
        header = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UnknownModel(f"{path} is not a safetensors file: its header is not JSON: {_AGAIN}") from error
    if not isinstance(header, dict):
        raise UnknownModel(f"{path} is not a safetensors file: its header names no tensors: {_AGAIN}")
    header.pop("__metadata__", None)
    return header


def _tensors(path: Path, header: dict[str, Any], begins: int, data_bytes: int) -> dict[str, Tensor]:
    """The tensors of a parsed header; their bytes must be all of the data, which begins at `begins`, without gap or overlap."""
    found: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, span = _entry(path, name, entry)
        spans.append(span)
        found[name] = Tensor(dtype, shape, span[1] - span[0], path, begins + span[0])
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise UnknownModel(
                f"the header of {path} lies: its tensors overlap or leave gaps at byte {end:,}: {_AGAIN}"
            )
        end = after
    if end > data_bytes:
        raise UnknownModel(
            f"{path} is cut off: its header names {end:,} bytes of weights, {data_bytes:,} are here: {_AGAIN}"
        )
    if end < data_bytes:
        raise UnknownModel(
            f"the header of {path} lies: it names {end:,} bytes of weights, {data_bytes:,} are here: {_AGAIN}"
        )
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _whole_numbers(shape) or not _whole_numbers(span) or len(span) != 2:
        raise UnknownModel(f"the header of {path} lies: {name[:100]} has no dtype, shape and offsets: {_AGAIN}")
    if dtype not in BITS:
        raise UnknownModel(f"{path} holds {name[:100]} in {dtype[:20]}, which is not a dtype of safetensors known here")
    if span[1] < span[0] or (span[1] - span[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise UnknownModel(
            f"the header of {path} lies: {name[:100]} of shape {list(shape)} in {dtype} does not take the "
            f"{span[1] - span[0]:,} bytes that it names: {_AGAIN}"
        )
    return dtype, tuple(shape), (span[0], span[1])


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def named(names: list[str], most: int = 3) -> str:
    """The first names, for a person."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
