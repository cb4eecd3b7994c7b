"""The capture on disk: a Zarr group of activations, and the journal that alone says what of it is done.

    <capture>/capture.json       the fingerprint that resume checks
    <capture>/activations.zarr/  one array a site (layer, sequence, position, feature), and token_ids, lengths, mask
    <capture>/journal.jsonl      a line a finished sequence: checksums of its chunks, bytes
    <capture>/lock               held by the process that writes

An uncompressed chunk is just its bytes, so chunks are written here as files, whole and once, and fsynced, which
zarr's own store does not do; zarr opens the result. bfloat16 is stored as its bits in uint16: zarr has no such dtype.
Knows bytes and indices, nothing of models. Before it: `capture`. After it: `summary`.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import CaptureMismatch, CorruptCapture
from outliers.files import sync_folder, write_atomic
from outliers.spec import FORMAT_VERSION

CHUNK_BYTES = 8 * 1024 * 1024
"""A chunk holds one layer of one sequence, up to this: 2048 tokens x 2048 features of bfloat16 exactly."""

STORAGE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""dtype of the model -> dtype on disk."""

NAN_BITS = {"bfloat16": 0x7FC0}
"""Fill values: what was never written reads as NaN, not as a quiet zero."""


@dataclass(frozen=True)
class Layout:
    """Shapes of a capture: `widths` features a site, in the sites' order; positions are cut into equal chunks."""

    widths: dict[str, int]
    layers: tuple[int, ...]
    num_sequences: int
    positions: int
    dtype: str
    codec: str
    chunk_bytes: int = CHUNK_BYTES

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return STORAGE[self.dtype].itemsize

    @property
    def position_chunks(self) -> int:
        """Chunks that the positions of one sequence are cut into, the same for every site."""
        return math.ceil(self.positions * max(self.widths.values()) * self.itemsize / self.chunk_bytes)

    @property
    def chunk_positions(self) -> int:
        """Positions in a chunk; the last chunk of a sequence is padded to it on disk."""
        return math.ceil(self.positions / self.position_chunks)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all chunks, uncompressed, padding of the last ones included."""
        per_token = len(self.layers) * sum(self.widths.values()) * self.itemsize
        return self.num_sequences * self.position_chunks * self.chunk_positions * per_token

    @property
    def side_bytes(self) -> int:
        """Bytes of token_ids (int32), mask (1 byte) and lengths (int32)."""
        return self.num_sequences * (self.positions * 5 + 4)

    @property
    def total_bytes(self) -> int:
        """Exact bytes of an uncompressed capture, the few kilobytes of JSON apart."""
        return self.activation_bytes + self.side_bytes

    def span(self, chunk: int) -> slice:
        """Positions of one chunk."""
        return slice(chunk * self.chunk_positions, min((chunk + 1) * self.chunk_positions, self.positions))


def create_arrays(folder: Path, layout: Layout, token_ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
    """Write the group's metadata and side arrays into `folder`/activations.zarr."""
    import zarr

    group = zarr.open_group(folder / "activations.zarr", mode="a")
    mask = np.arange(layout.positions)[None, :] < lengths[:, None]  # (sequence, position)
    names = {"token_ids": ("sequence", "position"), "lengths": ("sequence",), "mask": ("sequence", "position")}
    for name, values in (("token_ids", token_ids), ("lengths", lengths), ("mask", mask)):
        array = group.create_array(name, data=values, compressors=None, dimension_names=names[name], overwrite=True)
        array.attrs["unit"] = {"token_ids": "token id", "lengths": "tokens", "mask": "is a token"}[name]
    for site, width in layout.widths.items():
        _create_site(group, site, width, layout)


def _create_site(group: Any, site: str, width: int, layout: Layout) -> None:
    from zarr.codecs import BloscCodec

    stored = STORAGE[layout.dtype]
    array = group.create_array(
        site,
        shape=(len(layout.layers), layout.num_sequences, layout.positions, width),
        chunks=(1, 1, layout.chunk_positions, width),
        dtype=stored,
        fill_value=NAN_BITS.get(layout.dtype, float("nan")),
        compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")] if layout.codec == "zstd" else None,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("layer", "sequence", "position", "feature"),
        overwrite=False,
    )
    array.attrs.update({"dtype": layout.dtype, "layers": list(layout.layers), "site": site})


class ChunkFiles:
    """Chunks of one capture as files: encoded, checksummed, written whole, read back verified."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self.root = folder / "activations.zarr"

    def path(self, site: str, layer: int, sequence: int, chunk: int) -> Path:
        """File of a chunk; `layer` counts the captured layers from 0."""
        return self.root / site / f"c.{layer}.{sequence}.{chunk}.0"

    def write(self, site: str, layer: int, sequence: int, values: NDArray[Any]) -> list[tuple[int, int]]:
        """Write one layer of one sequence.

        values: (position, feature) in the storage dtype, all positions. Returns (crc32, bytes) of each chunk.
        """
        written = []
        for chunk in range(self.layout.position_chunks):
            block = values[self.layout.span(chunk)]
            short = self.layout.chunk_positions - block.shape[0]
            if short:
                fill = NAN_BITS.get(self.layout.dtype, np.nan)
                block = np.concatenate([block, np.full((short, block.shape[1]), fill, block.dtype)])
            content = self._encode(np.ascontiguousarray(block))
            write_durably(self.path(site, layer, sequence, chunk), content)
            written.append((zlib.crc32(content), len(content)))
        return written

    def read(self, site: str, layer: int, sequence: int, chunk: int, crc32: int) -> NDArray[Any]:
        """One chunk: (position, feature) in the storage dtype, padding cut off. Raises CorruptCapture."""
        path = self.path(site, layer, sequence, chunk)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptCapture(
                f"{path} is journaled and not there: `outliers captures rm` it and extract again"
            ) from error
        found = zlib.crc32(content)
        if found != crc32:
            raise CorruptCapture(
                f"{path} has checksum {found:08x}, the journal says {crc32:08x}: its bytes changed after they were written; "
                "`outliers captures rm` this capture and extract again"
            )
        span = self.layout.span(chunk)
        values = self._decode(content).reshape(self.layout.chunk_positions, self.layout.widths[site])
        return values[: span.stop - span.start]

    def sync(self) -> None:
        """Make the names of the chunks durable too."""
        for site in self.layout.widths:
            sync_folder(self.root / site)

    def _encode(self, block: NDArray[Any]) -> bytes | memoryview:
        if self.layout.codec == "none":
            return block.data.cast("B")
        from numcodecs import Blosc

        return bytes(Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE).encode(block))

    def _decode(self, content: bytes) -> NDArray[Any]:
        if self.layout.codec == "none":
            return np.frombuffer(content, STORAGE[self.layout.dtype])
        from numcodecs import blosc

        return np.frombuffer(blosc.decompress(content), STORAGE[self.layout.dtype])


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole: temporary name, fsync, rename. The directory is synced once a batch, see `ChunkFiles.sync`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb", buffering=0) as file:
        view = memoryview(content)
        while view.nbytes:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
    temporary.replace(path)


class Journal:
    """What of a capture is done. Lines are appended and fsynced after the chunks they name; a torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[int, dict[str, Any]] = {}

    @classmethod
    def open(cls, path: Path, *, repair: bool = False) -> Journal:
        """Read the journal; with `repair` cut a torn last line off the file. Raises CorruptCapture."""
        journal = cls(path)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if repair and whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            entry = cls._parse(line, number, path)
            journal.done[int(entry["sequence"])] = entry
        return journal

    @staticmethod
    def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads(line)
            body = {key: value for key, value in entry.items() if key != "line_crc32"}
            sound = entry["line_crc32"] == zlib.crc32(json.dumps(body, sort_keys=True).encode())
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise CorruptCapture(
                f"line {number} of {path} is damaged: `outliers captures rm` this capture and extract again"
            )
        return entry

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Record finished sequences, in one durable write."""
        lines = b""
        for entry in entries:
            crc = zlib.crc32(json.dumps(entry, sort_keys=True).encode())
            lines += json.dumps(entry | {"line_crc32": crc}, sort_keys=True).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(lines)
            os.fsync(file.fileno())
        for entry in entries:
            self.done[entry["sequence"]] = entry


def shapes_of(layout: Layout) -> dict[str, Any]:
    """A Layout as JSON holds it; `layout_from` reads it."""
    return dict(layout.__dict__)


def write_fingerprint(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Write capture.json."""
    write_atomic(folder / "capture.json", json.dumps(fingerprint, indent=1, sort_keys=True).encode())


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """capture.json, or None where no capture was begun. Raises CorruptCapture, CaptureMismatch for a newer format."""
    path = folder / "capture.json"
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        version = found["fixed"]["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCapture(
            f"{path} is not a capture's description: `outliers captures rm` it and extract again"
        ) from error
    if version > FORMAT_VERSION:
        raise CaptureMismatch(f"{folder} has format {version}, this version reads up to {FORMAT_VERSION}: upgrade")
    return found


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
    )


def is_complete(folder: Path) -> bool:
    """Whether every sequence of the capture in `folder` is journaled."""
    fingerprint = read_fingerprint(folder)
    if fingerprint is None:
        return False
    return len(Journal.open(folder / "journal.jsonl").done) == layout_from(fingerprint).num_sequences
