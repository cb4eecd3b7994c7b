"""Checks that a capture is what was written: every checksum, the metadata, the token ids, sums of experts, and unknown files.

Reads a capture, finished or not, without the model or the study, and continues after the first damage. With `repair` damaged
sequences are withdrawn in the journal, so that the next extraction computes only those.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32 as crc32_of
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from outliers.corpus.ids import lengths_hash, token_hash
from outliers.errors import CaptureError, CorruptCapture
from outliers.events.stream import Reporter
from outliers.store.chunks import ARRAYS, ChunkFiles, Journal, NamedChunk, group_files, hold, same_file
from outliers.store.damage import UNREADABLE, check_counts, check_sums
from outliers.store.damage import Damage as Damage
from outliers.store.durable import is_leftover
from outliers.store.fingerprint import layout_from, read_fingerprint
from outliers.store.journal import way_out
from outliers.store.repair import mark_repaired
from outliers.study.expert_shapes import SUMS
from outliers.study.layout import Layout

NAMED = 5
"""Damages that a message names; it gives the number of the others."""
WORKERS = 4
"""Threads that read. On two cores one thread read a cached capture at 1.1 GB/s, four at 2.0; more were not faster."""
_SIDE = ("token_ids", "lengths", "mask")
_CHUNK = re.compile(r"c\.\d+\.(\d+)\.\d+\.0")


class Verification(BaseModel):
    """The result of a check. `damage` is empty if everything in the journal is as it was written, finished or not."""

    model_config = ConfigDict(frozen=True)

    capture_id: str
    folder: str
    model: str
    done: int
    """Sequences that are journaled and undamaged."""
    of_sequences: int
    chunks: int
    """Chunks that were checked."""
    bytes: int
    seconds: float
    damage: tuple[Damage, ...]
    counted: int = 0
    """Sequences that were counted and freed (--store rolling): they are in a study's summary, and nothing of them is read."""
    marked: tuple[int, ...]
    """Sequences that `repair` withdraws."""
    left: int
    """Sequences that the study then computes: these, the rest of their batches, and unfinished ones."""
    repaired: bool
    unfinished: int
    """Chunks of unfinished sequences: the next extraction writes them again, nothing reads them."""
    foreign: tuple[str, ...]
    """Files among the arrays that do not belong to the capture; they are harmless."""

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def message(self) -> str:
        """The damage in a few words, and what to do about it."""
        named = "; ".join(str(item) for item in self.damage[:NAMED])
        more = f"; and {len(self.damage) - NAMED} more" if len(self.damage) > NAMED else ""
        return f"the capture {self.capture_id} is damaged: {named}{more}. {self.remedy()}"

    def remedy(self) -> str:
        """What to do about the damage."""
        if not self.of_sequences:
            return f"Put the file back, or `outliers captures rm {self.capture_id}` and extract again."
        again = f"{self.left} of {self.of_sequences} sequences"
        if self.repaired:
            return f"What is damaged is marked: the same study then computes {again}."
        return f"{way_out(Path(self.folder))}: {again}."


def verify(folder: Path, reporter: Reporter, *, repair: bool = False, workers: int = WORKERS) -> Verification:
    """Check a capture. Raises CaptureError if there is none or `repair` can't write, Busy if another process writes it."""
    if not repair:
        return _verify(folder, reporter, workers)
    try:
        with hold(folder):
            return _verify(folder, reporter, workers, repair=True)
    except OSError as error:
        raise CaptureError(f"{folder} can't be written ({error.strerror}): nothing was marked") from error


@dataclass
class _Found:
    """The findings of a pass over the capture."""

    damage: list[Damage] = field(default_factory=list)
    sequences: set[int] = field(default_factory=set)
    chunks: int = 0
    bytes: int = 0


def _verify(folder: Path, reporter: Reporter, workers: int, *, repair: bool = False) -> Verification:
    began = time.monotonic()
    facts: dict[str, Any] = {"capture_id": folder.name, "folder": str(folder), "repaired": False}
    try:
        fingerprint = read_fingerprint(folder)
    except CorruptCapture as error:
        lost = Damage(file="capture.json", problem=f"is lost: {error}")
        nothing = {"done": 0, "of_sequences": 0, "chunks": 0, "bytes": 0, "left": 0, "unfinished": 0, "seconds": 0.0}
        return Verification(**facts, **nothing, model="unknown", damage=(lost,), marked=(), foreign=())
    if fingerprint is None:
        raise CaptureError(f"there is no capture in {folder}: none was begun, or it was not described yet")
    layout = layout_from(fingerprint)
    files, journal = ChunkFiles(folder, layout), Journal.open(folder / "journal.jsonl", repair=repair, tolerant=True)
    found = _Found(_check_lines(journal, layout))
    lengths = _check_arrays(files, fingerprint["fixed"], found)
    _check_chunks(files, journal, lengths, found, reporter, workers)
    _forgive(found, Journal.open(journal.path, tolerant=True, keep=lambda line: {}), journal)
    if lengths is not None:
        _check_zarr(files, journal, found)
    found.damage += [*check_sums(folder), *check_counts(folder, journal)]
    marked = _to_mark(journal, found)
    if repair and found.damage:
        # the mark first: from then on existing results are not reused
        mark_repaired(folder, marked)
        _take_back(journal, layout, marked)
        for damage in found.damage:
            if damage.file.startswith(f"{SUMS}/"):
                (folder / damage.file).unlink(missing_ok=True)
            for line in [line for line in journal.counted.values() if line.state == damage.file]:
                journal.forget_counted(line.key)
    sound = {s for s in journal.done if s < layout.num_sequences} - marked
    unfinished, foreign = _strangers(files, journal, sound)
    counted = {sequence for sequence in journal.freed if sequence < layout.num_sequences}
    return Verification(
        **facts | {"repaired": repair and bool(found.damage)},
        model=str(fingerprint["fixed"].get("model", "?")),
        done=len(sound),
        of_sequences=layout.num_sequences,
        chunks=found.chunks,
        bytes=found.bytes,
        seconds=round(time.monotonic() - began, 3),
        damage=tuple(found.damage),
        marked=tuple(sorted(marked)),
        counted=len(counted),
        left=_left(sound | counted, layout.num_sequences, fingerprint.get("batch_sequences", 1)),
        unfinished=unfinished,
        foreign=foreign,
    )


def _check_lines(journal: Journal, layout: Layout) -> list[Damage]:
    beyond = sorted(sequence for sequence in journal.done if not 0 <= sequence < layout.num_sequences)
    return [
        *(Damage(file="journal.jsonl", problem=f"is damaged in line {number}") for number in journal.damaged),
        *(
            Damage(file="journal.jsonl", problem=f"names sequence {sequence}, the capture has {layout.num_sequences}")
            for sequence in beyond
        ),
    ]


def _check_arrays(files: ChunkFiles, fixed: dict[str, Any], found: _Found) -> NDArray[np.int32] | None:
    """Metadata and side arrays; returns the lengths, (sequence,) int32, or None if they are damaged."""
    layout, before = files.layout, len(found.damage)
    none = np.broadcast_to(np.int32(0), (layout.num_sequences, layout.positions))
    for name, wanted in group_files(layout, none, none[:, 0]):
        path = files.root / name
        if name.endswith("zarr.json"):
            try:
                problem = None if same_file(name, path.read_bytes(), wanted) else "does not describe this capture"
            except OSError as error:
                problem = _unread(error)
            if problem:
                found.damage.append(Damage(file=f"{ARRAYS}/{name}", problem=problem))
    if len(found.damage) > before:
        return None
    found.damage += check_side(files, fixed)
    return None if len(found.damage) > before else np.asarray(_read(files, "lengths"), np.int32)


def check_side(files: ChunkFiles, fixed: dict[str, Any]) -> list[Damage]:
    """Damage of token ids, lengths and mask, by the hashes under which the capture began (`fixed` of its fingerprint)."""
    read = {}
    for name in _SIDE:
        try:
            read[name] = _read(files, name)
        except UNREADABLE as error:
            return [Damage(file=f"{ARRAYS}/{name}", problem=f"can't be read through zarr: {error}")]
    ids, lengths, mask = (read[name] for name in _SIDE)
    damage = []
    hashes = (
        ("lengths", lengths_hash(lengths, files.layout.positions), fixed.get("lengths_sha256")),
        ("token_ids", token_hash(ids, lengths), fixed.get("token_sha256")),
    )
    for name, there, begun in hashes:
        if there != begun:
            damage.append(
                Damage(file=f"{ARRAYS}/{name}", problem=f"hashes to {there}, the capture was begun with {begun}")
            )
    if not np.array_equal(mask, np.arange(files.layout.positions)[None, :] < lengths[:, None]):
        damage.append(Damage(file=f"{ARRAYS}/mask", problem="does not agree with the lengths"))
    return damage


def _read(files: ChunkFiles, name: str, at: Any = slice(None)) -> NDArray[Any]:
    """Some values of an array, through zarr."""
    import zarr

    group: Any = zarr.open_group(files.root, mode="r")
    return np.asarray(group[name][at])


def _check_chunks(
    files: ChunkFiles,
    journal: Journal,
    lengths: NDArray[np.int32] | None,
    found: _Found,
    reporter: Reporter,
    workers: int,
) -> None:
    """Every chunk of every journal line, a sequence at a time."""
    entries = [entry for sequence, entry in sorted(journal.done.items()) if 0 <= sequence < files.layout.num_sequences]
    total = sum(len(crcs) for entry in entries for crcs in entry.get("crc32", {}).values())
    with ThreadPoolExecutor(workers) as pool:
        for entry, (sizes, damage) in zip(
            entries, pool.map(lambda entry: _check_sequence(files, entry, lengths), entries), strict=True
        ):
            found.chunks, found.bytes = found.chunks + len(sizes), found.bytes + sum(sizes)
            if damage:
                found.damage += damage
                found.sequences.add(entry["sequence"])
            reporter.progress("verify", found.chunks, max(total, found.chunks), "chunks")


def _forgive(found: _Found, later: Journal, journal: Journal) -> None:
    """Leave out sequences that a study freed while they were checked (--store rolling): no line names them any more."""
    gone = (journal.done.keys() - later.done.keys()) & later.freed
    found.damage = [damage for damage in found.damage if damage.sequence not in gone]
    found.sequences -= gone
    for sequence in gone:
        del journal.done[sequence]


def _check_sequence(
    files: ChunkFiles, entry: dict[str, Any], lengths: NDArray[np.int32] | None
) -> tuple[list[int], list[Damage]]:
    """Bytes of each chunk of a sequence, and the damage that was found."""
    layout, sequence = files.layout, entry["sequence"]
    wrong = Damage(file="journal.jsonl", problem=f"does not name the chunks of sequence {sequence}", sequence=sequence)
    try:
        named = list(files.named_by(entry))
    except CorruptCapture:
        return [], [wrong]
    if lengths is not None:
        chunks = len(layout.stored) * len(layout.layers) * layout.chunks_of(int(lengths[sequence])) + len(layout.fields)
        if len(named) != chunks:
            return [], [wrong]
    read = [_check_chunk(files, sequence, chunk) for chunk in named]
    return [size for size, _ in read], [damage for _, damage in read if damage is not None]


def _check_chunk(files: ChunkFiles, sequence: int, chunk: NamedChunk) -> tuple[int, Damage | None]:
    place: dict[str, Any] = {
        "file": str(chunk.path.relative_to(files.root.parent)),
        "sequence": sequence,
        "layer": None if chunk.layer is None else files.layout.layers[chunk.layer],
        "site": chunk.site,
        "journaled": f"{chunk.crc32:08x}",
    }
    try:
        content = chunk.path.read_bytes()
    except OSError as error:
        return 0, Damage(**place, problem=_unread(error))
    there = f"{crc32_of(content):08x}"
    if len(content) != chunk.size:
        problem = f"has {len(content):,} bytes, the journal says {chunk.size:,}"
        return len(content), Damage(**place, problem=problem, found=there)
    if there != place["journaled"]:
        problem = f"has checksum {there}, the journal says {chunk.crc32:08x}"
        return len(content), Damage(**place, problem=problem, found=there)
    return len(content), None


def _unread(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"


def _check_zarr(files: ChunkFiles, journal: Journal, found: _Found) -> None:
    """Read one chunk of each site through zarr itself: it must give the same bytes."""
    sound = sorted(set(journal.done) - found.sequences)
    if not sound or sound[0] >= files.layout.num_sequences:
        return
    first = {chunk.site: chunk for chunk in reversed(list(files.named_by(journal.done[sound[0]])))}
    for site, chunk in first.items():
        try:
            if chunk.layer is None:
                ours = files.read_table(site, sound[0], chunk.crc32)
                theirs = _read(files, site, (slice(None), sound[0]))
            else:
                ours = files.read(site, chunk.layer, sound[0], chunk.chunk, chunk.crc32)
                theirs = _read(files, site, (chunk.layer, sound[0], files.layout.span(chunk.chunk)))
            problem = None if ours.tobytes() == theirs.tobytes() else "reads as other values through zarr"
        except UNREADABLE as error:
            problem = f"can't be read through zarr: {error}"
        if problem:
            found.damage.append(Damage(file=f"{ARRAYS}/{site}", problem=problem))


def _to_mark(journal: Journal, found: _Found) -> set[int]:
    """Sequences to compute again. Any extraction repairs metadata: marking one sequence causes an extraction."""
    if found.sequences or journal.damaged or not found.damage:
        return set(found.sequences)
    return set(sorted(journal.done)[:1])


def _take_back(journal: Journal, layout: Layout, marked: Iterable[int]) -> None:
    beyond = [sequence for sequence in journal.done if not 0 <= sequence < layout.num_sequences]
    if journal.damaged or beyond:
        for sequence in {*marked, *beyond}:
            journal.done.pop(sequence, None)
        journal.rewrite()
    elif marked:
        journal.redo(sorted(marked))


def _left(sound: set[int], total: int, batch: int) -> int:
    """Sequences of the unfinished batches."""
    runs = [range(start, min(start + batch, total)) for start in range(0, total, batch)]
    return sum(len(run) for run in runs if not sound.issuperset(run))


def _strangers(files: ChunkFiles, journal: Journal, done: set[int]) -> tuple[int, tuple[str, ...]]:
    """The number of chunks of unfinished sequences, and the names of files that do not belong to the capture."""
    named = {chunk.path for sequence in done for chunk in files.named_by(journal.done[sequence])}
    named |= {files.root / name / "zarr.json" for name in ("", *_SIDE, *files.layout.stored, *files.layout.fields)}
    unfinished, foreign = 0, []
    own = (*files.layout.stored, *files.layout.fields)
    for place, _, names in os.walk(files.root):
        folder = Path(place).relative_to(files.root)
        for name in sorted(names):
            chunk = _CHUNK.fullmatch(name) if str(folder) in own else None
            side = folder.parts[:1] and folder.parts[0] in _SIDE and name.isdigit()
            if files.root / folder / name in named or side:
                continue
            if is_leftover(name) or (
                chunk and int(chunk[1]) < files.layout.num_sequences and int(chunk[1]) not in done
            ):
                unfinished += 1
            else:
                foreign.append(f"{ARRAYS}/{folder / name}")
    return unfinished, tuple(sorted(foreign))
