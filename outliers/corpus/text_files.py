"""Which files of a path hold text, and how each is opened: sorted by name, and each file looked into at once.

A file is a text, a table with a column of texts, or something else. Hidden names are left out, links are followed, and the
log names what is left out. gz and zst are unpacked while they are read. Nothing here knows columns or tokens.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from outliers.errors import CorpusError

log = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
TABLES = {
    ".parquet": "Parquet",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".arrow": "Arrow",
    ".feather": "Arrow",
}
"""Suffix -> kind of table."""
PACKED = {".gz": "gz", ".zst": "zst"}
ABOUT = (
    *("readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "authors"),
    *("code_of_conduct", "security", "dataset_card", "dataset-card", "datacard", "data_card", "requirements"),
)
"""First words of the names of texts that describe a data set."""
_ABOUT = re.compile(rf"(?:{'|'.join(ABOUT)})(?![a-z])")
ABOUT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
LONG_BYTES = 1 << 20
"""Bytes. A larger text is read only as far as its tokens are needed; of a packed file this much is checked first."""
_READ_BYTES = 1 << 20
_SHOWN = 5
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class FileKind:
    """What a file's name tells. suffix: lower case, without that of the packing; packed: gz, zst, or empty."""

    kind: Literal["text", "table", "other"]
    suffix: str
    packed: str = ""


@dataclass(frozen=True)
class TextFile:
    """One file that is read. name: its path below the corpus. stamp: size and time when it was hashed."""

    path: Path
    name: str
    kind: FileKind
    sha256: str
    stamp: tuple[int, int]

    def check_unchanged(self) -> None:
        """Raises CorpusError if the file has changed since it was hashed."""
        if _stamp(self.path) != self.stamp:
            raise CorpusError(f"{self.path} was changed while it was read: run again once no program writes to it")


def classify(name: str) -> FileKind:
    """The kind of a file by its name, in any case."""
    path = Path(name.lower())
    packed = PACKED.get(path.suffix, "")
    suffix = Path(path.stem).suffix if packed else path.suffix
    if suffix in TEXT_SUFFIXES:
        return FileKind("text", suffix, packed)
    if suffix in TABLES:
        return FileKind("table", suffix, packed)
    return FileKind("other", suffix, packed)


def find_files(path: Path) -> tuple[Literal["text", "table"], tuple[TextFile, ...]]:
    """The files of a corpus, all texts or all tables of one kind, checked. Raises CorpusError for anything else."""
    if path.is_file():
        kind = classify(path.name)
        if kind.kind == "other":
            kind = FileKind("text", kind.suffix, kind.packed)  # named by the user: its content is checked
        chosen = {path: kind}
    elif path.is_dir():
        chosen = _choose(path)
    else:
        raise CorpusError(f"{path} is neither a file nor a folder")
    files = tuple(_examine(file, path, chosen[file]) for file in sorted(chosen))
    if files[0].kind.kind == "table":
        return "table", files
    if all(not file.sha256 for file in files):
        raise CorpusError(f"{path} holds no text: {_named([f.path for f in files], path)} has nothing but blanks")
    return "text", tuple(_hashed(file) for file in files)


def _choose(root: Path) -> dict[Path, FileKind]:
    """The files of a folder to read: tables, without texts that describe them, or texts; the log names what is left out."""
    found = {file: classify(file.name) for file in _walk(root)}
    about = {file for file in found if _is_about(file.name)}
    texts = [file for file, kind in found.items() if kind.kind == "text" and file not in about]
    tables = [file for file, kind in found.items() if kind.kind == "table" and file not in about]
    if texts and tables:
        raise CorpusError(
            f"{root} holds texts ({_named(texts, root)}) and tables ({_named(tables, root)}): give one of the files, or a "
            "folder with one kind"
        )
    if tables:
        kinds = {TABLES[found[file].suffix]: file for file in sorted(tables, reverse=True)}
        if len(kinds) > 1:
            examples = ", ".join(str(file.relative_to(root)) for file in kinds.values())
            raise CorpusError(f"{root} mixes {' and '.join(sorted(kinds))} files ({examples}): give one kind")
        chosen = tables
    else:
        chosen = [file for file, kind in found.items() if kind.kind == "text"]
        others = [file for file in found if file not in about]
        if not chosen or (not texts and others):
            besides = f"; besides {_named(sorted(about), root)}" if about else ""
            names = f" has {_named(others, root)}" if others else ""
            looked = ", ".join((*TEXT_SUFFIXES, *TABLES))
            raise CorpusError(f"{root} holds no text: looked for {looked}, also .gz and .zst{besides}{names}")
    left = sorted(set(found) - set(chosen))
    if left:
        what = "tables" if tables else "texts"
        log.warning("%s: %d %s are read; left out: %s", root, len(chosen), what, _named(left, root))
    return {file: found[file] for file in chosen}


def _is_about(name: str) -> bool:
    lower = name.lower()
    if lower in ABOUT_TABLES:
        return True
    return bool(_ABOUT.match(lower)) and classify(name).kind != "table"


def _named(files: Sequence[Path], root: Path) -> str:
    names = [str(file.relative_to(root)) if file != root else file.name for file in files[:_SHOWN]]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _walk(root: Path) -> Iterator[Path]:
    """Every file below a folder whose names are not hidden; links are followed, and no folder is read twice."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop(0)
        try:
            status = folder.stat()
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise CorpusError(f"{folder} can't be read: {error.strerror}") from error
        if (status.st_dev, status.st_ino) in seen:
            log.warning("%s is a link to a folder that is read already: left out", folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        linked: list[Path] = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else waiting).append(entry)
            elif entry.is_file():
                yield entry
            elif entry.is_symlink():
                log.warning("%s is a link to nothing: left out", entry)
        waiting.extend(linked)  # after the real folders, so that these keep their own names


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _examine(path: Path, root: Path, kind: FileKind) -> TextFile:
    """Hash one file and check it; the sha256 of a blank text is empty here: a corpus needs one that is not blank."""
    name = str(path.relative_to(root)) if path != root else path.name
    hasher = hashlib.sha256()
    with reading(path):
        stamp = _stamp(path)
        plain_text = kind.kind == "text" and not kind.packed
        decoder = codecs.getincrementaldecoder("utf-8-sig")() if plain_text else None
        blank, at = True, 0
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                hasher.update(piece)
                if decoder is not None:
                    text = _decoded(decoder, piece, at, path)
                    blank = blank and not text.strip()
                at += len(piece)
        if decoder is not None:
            _decoded(decoder, b"", at, path, final=True)
        elif kind.kind == "text":
            with open_text(path, kind.packed) as stream:
                blank = not (text := stream.read(LONG_BYTES)).strip()
                check_text(text, path)
        if kind.kind == "text":
            _suspect_lines(path, kind)
    return TextFile(path, name, kind, "" if kind.kind == "text" and blank else hasher.hexdigest(), stamp)


def _hashed(file: TextFile) -> TextFile:
    if file.sha256:
        return file
    from outliers.files.atomic import sha256_file

    return TextFile(file.path, file.name, file.kind, sha256_file(file.path), file.stamp)


def _decoded(decoder: codecs.IncrementalDecoder, piece: bytes, at: int, path: Path, *, final: bool = False) -> str:
    encoding = next((name for mark, name in _MARKS.items() if at == 0 and piece.startswith(mark)), None)
    if encoding is not None:
        raise CorpusError(
            f"{path} is not UTF-8 text, it begins as {encoding}: iconv -f {encoding} -t UTF-8 makes it so"
        )
    try:
        text = decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error
    check_text(text, path)
    return text


def check_text(text: str, path: Path) -> None:
    """Raises CorpusError for NUL characters."""
    if "\0" in text:
        raise CorpusError(f"{path} is not UTF-8 text: it holds NUL bytes, as binary files do")


def not_text(path: Path, error: UnicodeDecodeError) -> CorpusError:
    """The error for bytes that are not UTF-8."""
    found = " ".join(f"0x{byte:02X}" for byte in error.object[error.start : error.start + 2])
    return CorpusError(
        f"{path} is not UTF-8 text ({error.reason}: {found}); where it is text in another encoding, "
        "iconv -f LATIN1 -t UTF-8 (or its own) makes it so"
    )


def _suspect_lines(path: Path, kind: FileKind) -> None:
    """Log that a text file whose first line is a JSON object is read as plain text."""
    with open_text(path, kind.packed) as stream:
        line = stream.readline(_READ_BYTES).strip()
    if line.startswith("{") and line.endswith("}") and '"' in line:
        log.warning(
            "%s is read as a text, though it looks like JSON lines: name it .jsonl to read its column text", path
        )


@contextmanager
def open_text(path: Path, packed: str, newline: str | None = None) -> Iterator[TextIO]:
    """A file as UTF-8 text without its byte order mark, unpacked while it is read."""
    binary: Any  # one of three classes of binary files
    if packed == "gz":
        binary = gzip.open(path, "rb")  # noqa: SIM115 - closed with the text below
    elif packed == "zst":
        import pyarrow as pa

        binary = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    else:
        binary = path.open("rb")
    with io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as stream:
        yield stream


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what readers of files raise inside the block into CorpusError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error
    except OSError as error:
        raise CorpusError(f"{path} can't be read: {error.strerror or error}") from error
    except (EOFError, ValueError, zlib.error, RecursionError) as error:
        raise CorpusError(f"{path} can't be read: {error}") from error


class LongText:
    """A text file that is read as far as needed."""

    def __init__(self, file: TextFile) -> None:
        self.file = file
        self._text = ""
        self._pieces = self._read()

    def first(self, characters: int) -> str:
        """The first characters; fewer only if the text ends. Raises CorpusError."""
        missing = characters - len(self._text)
        pieces = [self._text]
        while missing > 0 and (piece := next(self._pieces, "")):
            pieces.append(piece)
            missing -= len(piece)
        self._text = "".join(pieces)
        return self._text[:characters]

    def _read(self) -> Iterator[str]:
        path = self.file.path
        with reading(path), open_text(path, self.file.kind.packed) as stream:
            while piece := stream.read(_READ_BYTES):
                check_text(piece, path)
                self.file.check_unchanged()
                yield piece
