"""What the owner of a study sees of it on this machine alone: the names of his files, and the text around outliers.

    own/<study_id>.json         names of the model and the corpus, of a study of somebody's own files
    own/<study_id>.page.json    the names and the text with which the study's pages were rendered last

Both are for their owner alone and are never sent, fetched or published: what is published is rendered of the numbers. They lie
apart from the capture, which may be on another machine or removed. The text is read from this side's own corpus.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from outliers.advice.advise import verdict_words
from outliers.corpus.tokens import load_corpus
from outliers.errors import CorpusError
from outliers.files.private import MINE, file_mode
from outliers.files.sealed import read_sealed, write_sealed
from outliers.publish.allowlist import Numbers
from outliers.report.shown import Shown, TextAt, places_of
from outliers.results.schema import Advice, Probes, StudySummary, Tokens
from outliers.results.top_tokens import text_at
from outliers.spec import LOCAL_PREFIX, PUBLIC_NAME, path_name, public_name
from outliers.study.prepare import Prepared
from outliers.untrusted.visible import visible_line, visible_name
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

MAX_LISTED = 10_000
"""Records of names that are read for a list."""


class Names(NamedTuple):
    """What a model and a corpus are called on this machine."""

    model: str
    corpus: str


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1]
    study_id: str
    capture_id: str
    model: str
    corpus: str


class _Page(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1]
    model: str
    corpus: str
    texts: list[tuple[int, int, str, str, str]]


def is_private(prepared: Prepared) -> bool:
    """Whether this machine shows of a study what is not published: names of files, or text."""
    return not prepared.text or _names(prepared) != (prepared.public_model, prepared.public_corpus)


def keep_names(prepared: Prepared, workspace: Workspace) -> None:
    """Keep what a study of somebody's own files is called here, for lists of studies and captures. Raises OSError."""
    if not any(name.startswith(LOCAL_PREFIX) for name in (prepared.model.source.id, prepared.corpus.source)):
        return
    names = _names(prepared)
    kept = {"version": 1, "study_id": prepared.study_id, "capture_id": prepared.capture_id, **names._asdict()}
    _write(workspace.own(prepared.study_id), kept)


def own_names(workspace: Workspace, study_id: str) -> Names | None:
    """What the model and corpus of a study are called here; None where they are of nobody's own, or that is not known."""
    found = _read(workspace.own(study_id)) or _asked(workspace, study_id)
    return None if found is None else Names(found.model, found.corpus)


def public_names(manifest: Mapping[str, Any]) -> Names:
    """What model and corpus are called in what is published, from a manifest; nothing in it is believed to be a name."""
    spec, model = manifest["spec"], manifest["headline"]["model"]
    parts = {name: spec.get(name) if isinstance(spec.get(name), dict) else {} for name in ("model", "corpus")}
    given = {name: part.get("name") for name, part in parts.items()}
    named = {name: text for name, text in given.items() if isinstance(text, str) and re.fullmatch(PUBLIC_NAME, text)}
    source = parts["corpus"].get("source")
    corpus = visible_line(source) if isinstance(source, str) else ""
    return Names(named.get("model") or public_name(model), named.get("corpus") or corpus)


def names_here(workspace: Workspace, manifest: Mapping[str, Any]) -> Names:
    """What model and corpus of a finished study are called on this machine."""
    return own_names(workspace, manifest["study_id"]) or public_names(manifest)


def names_of_captures(workspace: Workspace) -> dict[str, str]:
    """What the models of captures are called here, by capture_id; those of nobody's own are left out."""
    found = {record.capture_id: record.model for record in _asked_records(workspace)}
    return found | {record.capture_id: record.model for record in _records(workspace)}


def show_own(prepared: Prepared, workspace: Workspace, numbers: Numbers) -> Shown | None:
    """The names and the text with which the pages of a study are rendered here; None where they are those that are published.

    They are kept, so that pages can be rendered again without the corpus. Raises OSError.
    """
    keep_names(prepared, workspace)
    if not is_private(prepared):
        return None
    texts = {} if prepared.text else _texts(prepared, workspace, numbers)
    names = _names(prepared)
    page = {"version": 1, **names._asdict(), "texts": [(*place, *text) for place, text in sorted(texts.items())]}
    _write(_page_place(workspace, prepared.study_id), page)
    return Shown(*names, published=published_line(prepared), texts=texts)


def shown_names(prepared: Prepared) -> Shown | None:
    """The same without text, for the page of a probe, which has none."""
    return Shown(*_names(prepared), published=published_line(prepared, text=False)) if is_private(prepared) else None


def is_shown(prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the pages of a study were rendered last with the names, and the text, that it has here now."""
    if not is_private(prepared):
        return True
    page = _read_page(workspace, prepared.study_id)
    return page is not None and (page.model, page.corpus) == _names(prepared)


def private_words(prepared: Prepared) -> dict[str, str]:
    """The names that are not published, each with what is published for it.

    Whole paths are among them: `runlog.scrub` sees where a path ends only if no folder in it has a blank in its name.
    """
    found: dict[str, str] = {}
    source = prepared.model.source
    if source.id.startswith(LOCAL_PREFIX):
        path = prepared.spec.model.id
        names = (source.name, path, _full(path), source.path, Path(source.path).name, path_name(path))
        found |= dict.fromkeys(names, prepared.public_model)
    if prepared.corpus.source.startswith(LOCAL_PREFIX):
        path = prepared.spec.corpus.source
        found |= dict.fromkeys((path, _full(path), path_name(path)), prepared.public_corpus)
    shown = {visible_name(name): public for name, public in found.items()}
    public = {prepared.public_model, prepared.public_corpus, source.id, prepared.corpus.source}
    return {name: said for name, said in (found | shown).items() if name and name not in public}


def _full(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def own_verdict(prepared: Prepared, probes: Probes, advice: Advice) -> str:
    """The paragraph of a verdict with the names of this machine."""
    return verdict_words(probes, advice, _names(prepared))


def published_line(prepared: Prepared, *, text: bool = True) -> str:
    """One sentence: what is published in the place of the names and, with `text`, the text of this machine."""
    names, silent = _names(prepared), text and not prepared.text
    model, corpus = names.model != prepared.public_model, names.corpus != prepared.public_corpus
    if model and corpus:
        said = f"this study is called {prepared.public_model}, its corpus {prepared.public_corpus}"
        said += ", and it shows no text" * silent
    elif model:
        said = f"this study is called {prepared.public_model}" + " and shows no text" * silent
    elif corpus:
        said = f"the corpus of this study is called {prepared.public_corpus}" + ", and no text is shown" * silent
    else:
        said = "this study shows no text" * silent
    return f"Published, {said}." if said else ""


def _names(prepared: Prepared) -> Names:
    """The names here; of a model of nobody's own the public one, which for a model of the hub is its whole id."""
    own = prepared.model.source.id.startswith(LOCAL_PREFIX)
    return Names(prepared.model_name if own else prepared.public_model, prepared.corpus_name)


def _texts(prepared: Prepared, workspace: Workspace, numbers: Numbers) -> dict[tuple[int, int], TextAt]:
    """The text at every token that the numbers name; nothing, and a line in the log, where the corpus can't be read."""
    summary = StudySummary.model_validate(numbers.summary, extra="ignore")
    tokens = Tokens.model_validate(numbers.tokens, extra="ignore")
    places = sorted(set(places_of(summary, tokens)))
    kept = _read_page(workspace, prepared.study_id)
    known = {} if kept is None else {(row[0], row[1]): row[2:] for row in kept.texts}
    if all(place in known for place in places):
        return {place: known[place] for place in places}
    try:
        corpus = load_corpus(prepared.corpus, workspace)
        # numbers of a store may name a token that the corpus does not have
        own = [(row, at) for row, at in places if row < len(corpus.lengths) and at < int(corpus.lengths[row])]
        return {(row, at): text_at(corpus, row, at) for row, at in own}
    except CorpusError as error:
        log.warning("the report shows no text: %s", error)
        return {}


def _page_place(workspace: Workspace, study_id: str) -> Path:
    place = workspace.own(study_id)
    return place.with_name(f"{place.stem}.page.json")


def _write(place: Path, content: dict[str, object]) -> None:
    place.parent.mkdir(mode=MINE, parents=True, exist_ok=True)
    write_sealed(place, content, mode=file_mode(place.parent))


def _read(place: Path) -> _Record | None:
    found = read_sealed(place)
    try:
        return None if found is None else _Record.model_validate(found)
    except ValidationError:
        return None  # of another version


def _read_page(workspace: Workspace, study_id: str) -> _Page | None:
    found = read_sealed(_page_place(workspace, study_id))
    try:
        return None if found is None else _Page.model_validate(found)
    except ValidationError:
        return None


def _records(workspace: Workspace) -> Iterator[_Record]:
    places = sorted(workspace.own("any").parent.glob("*.json"))
    for place in [place for place in places if not place.name.endswith(".page.json")][:MAX_LISTED]:
        if (found := _read(place)) is not None:
            yield found


def _asked_records(workspace: Workspace) -> Iterator[_Record]:
    """Studies of before names were kept: as they were asked for."""
    for place in sorted(workspace.asked("any").parent.glob("*.json"))[:MAX_LISTED]:
        if not workspace.own(place.stem).exists() and (found := _asked(workspace, place.stem)) is not None:
            yield found


def _asked(workspace: Workspace, study_id: str) -> _Record | None:
    place = workspace.asked(study_id)
    found = read_sealed(place)
    try:
        prepared = None if found is None else Prepared.model_validate(found)
    except ValidationError:
        return None
    if prepared is None or not any(
        name.startswith(LOCAL_PREFIX) for name in (prepared.model.source.id, prepared.corpus.source)
    ):
        return None
    names = _names(prepared)
    return _Record(version=1, study_id=study_id, capture_id=prepared.capture_id, **names._asdict())
