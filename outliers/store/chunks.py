"""The capture on disk: a Zarr group of activations, and a journal that alone says which sequences are done.

    <capture>/capture.json       the conditions that a resumed capture must match (`fingerprint`)
    <capture>/activations.zarr/  one array for each site (layer, sequence, position, feature), and token_ids, lengths, mask;
                                 of a mixture of experts the routing table (layer, sequence, position, slot)
    <capture>/journal.jsonl      a line for each finished sequence: checksums of its chunks, bytes (`journal`)
    <capture>/lock               held by the process that writes

An uncompressed chunk is just its bytes, so this module writes chunks as files, whole and once (`durable`), and they are on
the disk before the journal names them, which zarr's own store does not ensure. zarr opens the result. bfloat16 is stored as
its bits in uint16: zarr has no such dtype. Knows bytes and indices, nothing of models.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32 as crc32_of
from numpy.typing import NDArray

from outliers.corpus.rows import IntRows
from outliers.errors import Busy, CaptureError, CorruptCapture
from outliers.files.atomic import sync_folder
from outliers.store.durable import Unsynced, write_durably, write_soon
from outliers.store.fingerprint import layout_from, read_fingerprint
from outliers.store.journal import Counted as Counted
from outliers.store.journal import Journal as Journal
from outliers.store.journal import way_out
from outliers.study.expert_shapes import FIELDS, ExpertShapes
from outliers.study.layout import NAN_BITS, STORAGE, Layout

ARRAYS = "activations.zarr"


def create_arrays(folder: Path, layout: Layout, token_ids: IntRows, lengths: NDArray[np.int32]) -> None:
    """Write the group's metadata and side arrays into `folder`/activations.zarr; they and their folders are on the disk then."""
    mend_arrays(folder, layout, token_ids, lengths)
    for place in (folder.parent, folder.parent.parent):
        sync_folder(place)


def mend_arrays(folder: Path, layout: Layout, token_ids: IntRows, lengths: NDArray[np.int32]) -> tuple[str, ...]:
    """Write the files of metadata and side arrays that are missing or changed; returns their names.

    Raises CaptureError if a file is in the place of a folder.
    """
    root, mended = folder / ARRAYS, []
    for name, content in group_files(layout, token_ids, lengths):
        path = root / name
        if not (path.is_file() and same_file(name, path.read_bytes(), content)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise CaptureError(f"{path.parent} is in the way of a folder of the capture: move it away") from error
            write_durably(path, content)
            mended.append(name)
    written = [place for name in mended for place in (root / name).parents if place.is_relative_to(folder)]
    for place in dict.fromkeys(written):
        sync_folder(place)
    return tuple(mended)


def same_file(name: str, found: bytes, wanted: bytes) -> bool:
    """Whether a file of the group has the wanted content: metadata by meaning, with other attributes allowed; others by bytes."""
    if not name.endswith("zarr.json"):
        return found == wanted
    try:
        there, should = json.loads(found), json.loads(wanted)
        attributes = should.pop("attributes")
        return bool(should.items() <= there.items() and attributes.items() <= there["attributes"].items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def group_files(layout: Layout, token_ids: IntRows, lengths: NDArray[np.int32]) -> Iterator[tuple[str, bytes]]:
    """Every file of the group except the chunks of activations: names below activations.zarr, each with its content.

    The arrays of ids and mask are made some sequences at a time, so that the memory does not grow with the corpus.
    """
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files))
    yield from _side_files(group, files, layout, token_ids, lengths)
    for site, width in layout.stored.items():
        _create_site(group, site, width, layout)
    if layout.experts is not None:
        _create_table(group, layout.experts, layout)
    if layout.aliases:
        group.attrs["alias_of"] = layout.aliases
    yield from ((name, buffer.to_bytes()) for name, buffer in files.items())


def _side_files(
    group: Any, files: dict[str, Any], layout: Layout, token_ids: IntRows, lengths: NDArray[np.int32]
) -> Iterator[tuple[str, bytes]]:
    """The chunks of the side arrays, taken out of the store as they are made; their metadata stays in it."""

    def mask(rows: slice) -> NDArray[np.bool_]:
        return np.asarray(np.arange(layout.positions)[None, :] < lengths[rows, None])

    sequences, both = (layout.num_sequences,), (layout.num_sequences, layout.positions)
    for name, shape, dtype, unit, made in (
        ("token_ids", both, np.int32, "token id", lambda rows: token_ids[rows]),
        ("lengths", sequences, np.int32, "tokens", lambda rows: lengths[rows]),
        ("mask", both, np.bool_, "is a token", mask),
    ):
        array = group.create_array(
            name, shape=shape, dtype=dtype, compressors=None, dimension_names=("sequence", "position")[: len(shape)]
        )
        array.attrs["unit"] = unit
        described = set(files)
        for first in range(0, layout.num_sequences, array.chunks[0]):
            rows = slice(first, min(first + array.chunks[0], layout.num_sequences))
            array[rows] = made(rows)
            for chunk in [key for key in files if key not in described]:
                yield chunk, files.pop(chunk).to_bytes()


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
    )
    array.attrs.update({"dtype": layout.dtype, "layers": list(layout.layers), "site": site})


def _create_table(group: Any, experts: ExpertShapes, layout: Layout) -> None:
    """The arrays of the routing table: a chunk holds all layers of one sequence, and is not compressed."""
    for field in experts.fields:
        dtype, fill = FIELDS[field]
        slots = experts.slots_of(field)
        array = group.create_array(
            field,
            shape=(len(experts.layers), layout.num_sequences, layout.positions, slots),
            chunks=(len(experts.layers), 1, layout.positions, slots),
            dtype=dtype,
            fill_value=float("nan") if dtype.kind == "f" else fill,
            compressors=None,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("layer", "sequence", "position", "slot"),
        )
        array.attrs.update({"layers": list(experts.layers), "experts": experts.experts})


class NamedChunk(NamedTuple):
    """A chunk that a journal line names; `layer` counts the captured layers from 0, None for the routing table's."""

    site: str
    layer: int | None
    chunk: int
    path: Path
    crc32: int
    size: int


class ChunkFiles:
    """Chunks of one capture as files: encoded, checksummed, written whole, read back verified."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self.root = folder / ARRAYS
        self.chunk_positions = layout.chunk_positions
        self._place = str(self.root)

    def path(self, site: str, layer: int, sequence: int, chunk: int) -> Path:
        """File of a chunk; `layer` counts the captured layers from 0."""
        return Path(self._file(site, layer, sequence, chunk))

    def _file(self, site: str, layer: int, sequence: int, chunk: int) -> str:
        # making a Path for every chunk takes longer than opening the file
        return f"{self._place}/{site}/c.{layer}.{sequence}.{chunk}.0"

    def write(
        self, site: str, layer: int, sequence: int, values: NDArray[Any], unsynced: Unsynced
    ) -> list[tuple[int, int]]:
        """Write one layer of one sequence; it is durable after `unsynced.sync()`.

        values: (position, feature) in the storage dtype, a position for each token of the sequence; the rest of the last
        chunk is filled with NaN. Returns (crc32, bytes) of each chunk.
        """
        written = []
        for chunk in range(self.layout.chunks_of(values.shape[0])):
            block = values[self.layout.span(chunk)]
            short = self.layout.chunk_positions - block.shape[0]
            if short:
                fill = NAN_BITS.get(self.layout.dtype, np.nan)
                block = np.concatenate([block, np.full((short, block.shape[1]), fill, block.dtype)])
            content = self._encode(np.ascontiguousarray(block))
            written.append((crc32_of(content), len(content)))
            write_soon(self._file(site, layer, sequence, chunk), content, unsynced)
        return written

    def read(self, site: str, layer: int, sequence: int, chunk: int, crc32: int) -> NDArray[Any]:
        """One chunk without padding: (position, feature) in the storage dtype. Raises CorruptCapture."""
        content = self._checked(self.path(site, layer, sequence, chunk), crc32)
        span = self.layout.span(chunk)
        values = self._decode(content).reshape(self.layout.chunk_positions, self.layout.widths[site])
        return values[: span.stop - span.start]

    def _checked(self, path: Path, crc32: int) -> bytes:
        """The bytes of a chunk. Raises CorruptCapture where they are not those that were written."""
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptCapture(f"{path} is in the journal, but missing: {way_out(self.root.parent)}") from error
        except OSError as error:
            raise CorruptCapture(f"{path} can't be read ({error.strerror}): {way_out(self.root.parent)}") from error
        if crc32_of(content) != crc32:
            raise CorruptCapture(self._changed(path, crc32))
        return content

    def tiles(
        self, site: str, layer: int, sequence: int, chunk: int, crc32: int, buffer: NDArray[Any]
    ) -> Iterator[NDArray[Any]]:
        """One chunk in runs of positions, with the padding of the last chunk: views of `buffer`, each valid until the next.

        buffer: (position, feature) unsigned integers of the values' size. The file is read once, run by run, and its
        checksum is compared at the end: counts of a chunk are valid only after the last run. Raises CorruptCapture.
        """
        rows, left = buffer.shape[0], self.chunk_positions
        if self.layout.codec != "none":
            whole = self.read(site, layer, sequence, chunk, crc32).view(buffer.dtype)
            for at in range(0, whole.shape[0], rows):
                run = buffer[: whole.shape[0] - at]
                run[:] = whole[at : at + rows]
                yield run
            return
        path = self._file(site, layer, sequence, chunk)
        found, whole_file = 0, True
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CorruptCapture(f"{path} is in the journal, but missing: {way_out(self.root.parent)}") from error
        try:
            while left > 0 and whole_file:
                run = buffer[:left]
                content = run.data.cast("B")
                whole_file = _fill(file, content)
                found = crc32_of(content, found)
                left -= rows
                if whole_file:
                    yield run
            longer = os.read(file, 1) != b""
        except OSError as error:
            raise CorruptCapture(f"{path} can't be read ({error.strerror}): {way_out(self.root.parent)}") from error
        finally:
            os.close(file)
        if found != crc32 or not whole_file or longer:
            raise CorruptCapture(self._changed(Path(path), crc32))

    def _changed(self, path: Path, crc32: int) -> str:
        content = path.read_bytes()
        return (
            f"{path} has checksum {crc32_of(content):08x} in {len(content):,} bytes, the journal says {crc32:08x}: its bytes "
            f"changed after they were written; {way_out(self.root.parent)}"
        )

    def write_table(self, field: str, sequence: int, values: NDArray[Any], unsynced: Unsynced) -> list[tuple[int, int]]:
        """Write a field of the routing table of one sequence; it is durable after `unsynced.sync()`.

        values: (layer, position, slot) in the field's dtype, padding included. Returns (crc32, bytes).
        """
        content = np.ascontiguousarray(values).data.cast("B")
        write_soon(self._file(field, 0, sequence, 0), content, unsynced)
        return [(crc32_of(content), len(content))]

    def read_table(self, field: str, sequence: int, crc32: int) -> NDArray[Any]:
        """A field of the routing table of one sequence: (layer, position, slot), padding included. Raises CorruptCapture."""
        if self.layout.experts is None:
            raise CorruptCapture(f"{self.root.parent} holds no experts")
        dtype, _ = FIELDS[field]
        shape = (len(self.layout.experts.layers), self.layout.positions, self.layout.experts.slots_of(field))
        content = self._checked(self.path(field, 0, sequence, 0), crc32)
        return np.frombuffer(content, dtype).reshape(shape)

    def free(self, sequence: int, tokens: int) -> None:
        """Remove every chunk of a sequence of that many tokens, and its routing table; what is gone already is passed over."""
        for name in self._files_of(sequence, tokens):
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()

    def is_freed(self, sequence: int, tokens: int) -> bool:
        """Whether `free` came to its end: it removes the last chunk last."""
        return not Path(self._files_of(sequence, tokens)[-1]).exists()

    def _files_of(self, sequence: int, tokens: int) -> list[str]:
        """Every file of a sequence of that many tokens."""
        chunks, layers = range(self.layout.chunks_of(tokens)), range(len(self.layout.layers))
        tables = [self._file(field, 0, sequence, 0) for field in self.layout.fields]
        return tables + [
            self._file(site, layer, sequence, n) for site in self.layout.stored for layer in layers for n in chunks
        ]

    def named_by(self, entry: dict[str, Any]) -> Iterator[NamedChunk]:
        """The chunks of a journal line. Raises CorruptCapture if it does not name all of them."""
        layers, sequence = len(self.layout.layers), entry["sequence"]
        for site in self.layout.stored:
            crcs, sizes = entry.get("crc32", {}).get(site, ()), entry.get("sizes", {}).get(site, ())
            if not crcs or len(crcs) != len(sizes) or len(crcs) % layers:
                raise CorruptCapture(
                    f"the journal names {len(crcs)} checksums and {len(sizes)} sizes of {site} of sequence {sequence}, in "
                    f"{layers} layers: {way_out(self.root.parent)}"
                )
            chunks = len(crcs) // layers
            for at, (crc32, size) in enumerate(zip(crcs, sizes, strict=True)):
                layer, chunk = divmod(at, chunks)
                yield NamedChunk(site, layer, chunk, self.path(site, layer, sequence, chunk), crc32, size)
        for field in self.layout.fields:
            crcs, sizes = entry.get("crc32", {}).get(field, ()), entry.get("sizes", {}).get(field, ())
            if len(crcs) != 1 or len(sizes) != 1:
                raise CorruptCapture(
                    f"the journal names no experts of sequence {sequence} ({field}): {way_out(self.root.parent)}"
                )
            yield NamedChunk(field, None, 0, self.path(field, 0, sequence, 0), crcs[0], sizes[0])

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


def _fill(file: int, content: memoryview) -> bool:
    """Read until `content` is full; False if the file ends before."""
    while content:
        count = os.readv(file, [content])
        if not count:
            return False
        content = content[count:]
    return True


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of a capture, since two writers would corrupt it. Raises Busy."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another process is writing {folder}: wait for it, or end it") from error
        if os.fstat(file.fileno()).st_nlink == 0:
            raise Busy(f"{folder} was removed just now: run the same again")
        yield


def has_losses(folder: Path) -> bool:
    """Whether the loss of every journaled sequence was measured: the capture of a study without perplexity has none."""
    journal = Journal.open(folder / "journal.jsonl", keep=lambda line: {"nll": line["nll"]} if "nll" in line else {})
    return all("nll" in line for line in journal.done.values())


def is_complete(folder: Path) -> bool:
    """Whether every sequence of the capture in `folder` is journaled."""
    fingerprint = read_fingerprint(folder)
    if fingerprint is None:
        return False
    return len(Journal.open(folder / "journal.jsonl").done) == layout_from(fingerprint).num_sequences
