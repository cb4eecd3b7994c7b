"""The text of a corpus on this machine: CPython's own documentation, a file, or a folder. `hub_data` has data sets of the hub.

Each source has a public name, an identity (which changes when its text would), and its documents in an order that the seed
fixes. The order is made here and not by `datasets`: the same seed means different orders in its versions 4 and 5. Nothing
here knows tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from outliers.corpus.text_files import LONG_BYTES, LongText, TextFile, classify, find_files
from outliers.corpus.text_rows import check_table, texts_of
from outliers.errors import CorpusError
from outliers.spec import CorpusSpec

SHUFFLE_BUFFER = 1_000
"""Rows of a data set in the shuffle buffer: a larger one mixes better and starts later."""
SHUFFLE_VERSION = 2
"""Increased whenever the same rows, seed and buffer give another order."""


@dataclass(frozen=True)
class DocumentSource:
    """One source: `texts(spec)` yields documents; `identity` changes whenever these would."""

    name: str
    identity: tuple[str, ...]
    public: bool
    texts: Callable[[CorpusSpec], Iterator[str] | Iterator[str | LongText]]


def find_local(spec: CorpusSpec) -> DocumentSource | None:
    """The source if it is on this machine; None for a data set of the hub, which gets no request."""
    if spec.source.startswith("builtin:"):
        return _builtin(spec.source)
    try:
        path = Path(spec.source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user for an unknown user
        raise CorpusError(f"there is no text at {spec.source}: {error}") from error
    if exists:
        kind, files = find_files(path)
        return _text_files(files) if kind == "text" else _tables(path, files)
    named = classify(path.name)
    looks_local = spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1
    if looks_local or named.kind != "other" or named.packed:
        raise CorpusError(f"there is no text at {spec.source}")
    return None


def in_order(names: list[str], seed: int) -> list[int]:
    """Positions of `names` in the order that `seed` fixes on every machine: by the sha256 of seed and name."""
    keys = [hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest() for name in names]
    return sorted(range(len(names)), key=keys.__getitem__)


def _builtin(source: str) -> DocumentSource:
    if source != "builtin:python-docs":
        raise CorpusError(f"'{source}' is not built in; built in: builtin:python-docs")
    from pydoc_data.topics import topics

    names = sorted(topics)
    content = hashlib.sha256("\0".join(f"{name}\0{topics[name]}" for name in names).encode()).hexdigest()

    def texts(spec: CorpusSpec) -> Iterator[str]:
        return (topics[names[index]] for index in in_order(names, spec.seed))

    return DocumentSource(name=source, identity=(source, content), public=True, texts=texts)


def _content(files: Sequence[TextFile]) -> str:
    """Changes if a file is renamed or any byte of it changes."""
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(os.fsencode(file.name) + b"\0" + bytes.fromhex(file.sha256))
    return hasher.hexdigest()


def _text_files(files: Sequence[TextFile]) -> DocumentSource:
    content = _content(files)
    names = [file.name for file in files]

    def texts(spec: CorpusSpec) -> Iterator[str | LongText]:
        for index in in_order(names, spec.seed):
            text = LongText(files[index])
            small = not files[index].kind.packed and files[index].stamp[0] <= LONG_BYTES
            yield text.first(LONG_BYTES + 1) if small else text

    return DocumentSource(name=f"local:{content[:12]}", identity=("text", content), public=False, texts=texts)


def shuffled(rows: Iterable[str], seed: int, buffer: int) -> Iterator[str]:
    """`rows` in the order that `seed` fixes on every machine, no row earlier than `buffer` rows before its place.

    Each row takes the place in the buffer of one that is given out; which one, the sha256 of seed and number says.
    """
    draws = (
        int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big") for number in itertools.count()
    )
    held: list[str] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        place = next(draws) % buffer
        given, held[place] = held[place], row
        yield given
    while held:
        place = next(draws) % len(held)
        held[place], held[-1] = held[-1], held[place]
        yield held.pop()


def _tables(path: Path, files: Sequence[TextFile]) -> DocumentSource:
    """Files with a text column, with their rows ordered like those of a data set of the hub."""
    content = _content(files)
    looks = [check_table(file) for file in files]  # check every file, also after one that has text
    if not any(looks):
        raise CorpusError(f"{path} holds no text: every row of its column 'text' is empty")

    def rows(seed: int) -> Iterator[str]:
        for index in in_order([str(number) for number in range(len(files))], seed):
            yield from texts_of(files[index])

    def texts(spec: CorpusSpec) -> Iterator[str]:
        return shuffled(rows(spec.seed), spec.seed, SHUFFLE_BUFFER)

    identity = ("table", content, *ORDER)
    return DocumentSource(name=f"local:{content[:12]}", identity=identity, public=False, texts=texts)


ORDER = ("shuffled", str(SHUFFLE_VERSION), str(SHUFFLE_BUFFER))
