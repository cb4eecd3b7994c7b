"""Where the text of a corpus comes from: CPython's own documentation, a file, a folder, a data set of the hub.

Each source has a public name, an identity (what would change its text), and its documents in an order that the seed
fixes. Nothing here knows tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.errors import CorpusError
from outliers.hub import resolve
from outliers.spec import CorpusSpec

log = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
TABLE_SUFFIXES = (".parquet", ".jsonl", ".json")
SHUFFLE_BUFFER = 1_000
"""Rows of a streamed data set among which the seed chooses: larger mixes better and starts later."""


@dataclass(frozen=True)
class DocumentSource:
    """One source: `texts(spec)` yields documents, `identity` changes when they would."""

    name: str
    identity: tuple[str, ...]
    public: bool
    texts: Callable[[CorpusSpec], Iterator[str]]


def find_documents(spec: CorpusSpec) -> DocumentSource:
    """The source that `spec` names. Raises CorpusError where it can't be read, HubUnavailable."""
    if spec.source.startswith("builtin:"):
        return _builtin(spec.source)
    path = Path(spec.source).expanduser()
    if path.exists():
        files = _files(path)
        if all(file.suffix in TABLE_SUFFIXES for file in files):
            return _tables(path, files)
        return _text_files(path, files)
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1 or path.suffix in TEXT_SUFFIXES:
        raise CorpusError(f"there is no text at {spec.source}")
    return _hub(spec)


def in_order(names: list[str], seed: int) -> list[int]:
    """Positions of `names` in the order that `seed` fixes on every machine: by the sha256 of seed and name."""
    keys = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names]
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


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in (*TEXT_SUFFIXES, *TABLE_SUFFIXES))
    if not found:
        raise CorpusError(f"{path} holds no text: looked for {', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))}")
    return found


def _content(files: list[Path], root: Path) -> str:
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(f"{file.relative_to(root) if file != root else file.name}\0".encode())
        try:
            hasher.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise CorpusError(f"{file} can't be read: {error.strerror}") from error
    return hasher.hexdigest()


def _text_files(path: Path, files: list[Path]) -> DocumentSource:
    content = _content(files, path)
    names = [str(file.relative_to(path)) if file != path else file.name for file in files]

    def texts(spec: CorpusSpec) -> Iterator[str]:
        for index in in_order(names, spec.seed):
            try:
                yield files[index].read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CorpusError(f"{files[index]} is not UTF-8 text: {error}") from error

    return DocumentSource(name=f"local:{content[:12]}", identity=("text", content), public=False, texts=texts)


def _tables(path: Path, files: list[Path]) -> DocumentSource:
    """Parquet or JSON-lines files with a text column, read as the hub's data sets are."""
    content = _content(files, path)
    kinds = {"parquet" if file.suffix == ".parquet" else "json" for file in files}
    if len(kinds) > 1:
        raise CorpusError(f"{path} mixes Parquet and JSON files: give one kind")

    def texts(spec: CorpusSpec) -> Iterator[str]:
        from datasets import load_dataset

        rows = load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train", streaming=True)
        return _rows(rows, spec, str(path))

    return DocumentSource(name=f"local:{content[:12]}", identity=("table", content), public=False, texts=texts)


def _hub(spec: CorpusSpec) -> DocumentSource:
    found = resolve("dataset", spec.source, spec.corpus_revision, CorpusError)

    def texts(spec: CorpusSpec) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise CorpusError("a data set of the hub needs: pip install 'outlier-features[flows]'") from error
        try:
            rows = load_dataset(spec.source, spec.subset, split=spec.split, streaming=True, revision=found.commit)
        except (ValueError, OSError) as error:
            raise CorpusError(f"the data set {spec.source} can't be read: {error}") from error
        return _rows(rows, spec, spec.source)

    identity = ("hub", spec.source, found.commit, str(spec.subset), spec.split)
    return DocumentSource(name=spec.source, identity=identity, public=found.public, texts=texts)


def _rows(rows: Any, spec: CorpusSpec, place: str) -> Iterator[str]:
    """The text column of a streamed data set, shuffled within a buffer by the seed."""
    for row in rows.shuffle(seed=spec.seed, buffer_size=SHUFFLE_BUFFER):
        text = row.get("text")
        if not isinstance(text, str):
            raise CorpusError(f"{place} has no column 'text'; its columns: {', '.join(sorted(row))}")
        yield text
