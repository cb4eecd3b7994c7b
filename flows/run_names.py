"""What a flow run is called: the name that a person gave it, else one that says what it does.

Prefect gives a run without a name two random words, its form proposes others, and a flow that renders a name puts that in the
place of all of them. The server does not keep whether a name was given. So a name is replaced only where it is word for word
one that Prefect makes: each of its words is looked up in Prefect's own lists, as they are installed. What is not in them, or
can't be looked up, is a person's and stays. It knows no server.
"""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import Any

import prefect
from prefect.runtime import flow_run
from pydantic import ValidationError

from outliers.spec import CorpusSpec, ModelSpec, StudySpec, short_model_name

_GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi|psi"
_PROPOSED = re.compile(rf"(?:{_GREEK}|omega)[0-9]{{0,3}}-([a-z-]+)")
"""How a name begins that the form proposes: `alpha2-andromedae-void`."""
_PLACES = re.compile(r"[`\"'](andromedae\.antliae\.[a-z.-]+)[`\"']")
_ENDINGS = re.compile(r"[`\"'](a\.b\.c\.[a-z.]*\.nebula\.[a-z.]+)[`\"']")
"""The form's lists of words in Prefect's pages: texts of words with dots between them."""


def study_name() -> str:
    """`study SmolLM2-135M-Instruct 8x512 python-docs`, or the name that was given."""
    return _given() or _described(flow_run.parameters)


def described(spec: StudySpec) -> str:
    """`SmolLM2-135M-Instruct 8x512 python-docs`, before anything of a study is looked up."""
    return _shape(short_name(spec.model), spec.corpus)


def sweep_name() -> str:
    """`sweep moe`, or the name that was given."""
    asked = flow_run.parameters
    made = f"sweep {Path(asked['file']).stem}" if asked.get("file") else f"sweep of {len(asked.get('study') or ())}"
    return _given() or made


def reap_name() -> str:
    """`reap`, or the name that was given."""
    return _given() or "reap"


def short_name(model: ModelSpec | str | dict[str, Any]) -> str:
    """`SmolLM2-135M`, from the parameters alone: nothing is looked up for a name."""
    return short_model_name(model if isinstance(model, str) else ModelSpec.model_validate(model).id)


def is_generated(name: str) -> bool:
    """Whether a name is one that Prefect makes: that of its server (`happy-jackal`), or that of its form (`xi4-rigel-k`)."""
    first, dash, second = name.partition("-")
    if dash and first in _words("adj_any") and second in _words("subj"):
        return True
    proposed = _PROPOSED.fullmatch(name)
    if proposed is None:
        return False
    places, endings = _form_words()
    place, _, ending = proposed[1].rpartition("-")
    return proposed[1] in places or (place in places and ending in endings)


def _given() -> str | None:
    name = flow_run.name
    return None if not name or is_generated(name) else str(name)


def _described(asked: dict[str, Any]) -> str:
    """A study's name from its parameters. Values that are no study's are refused by the flow, not by its name."""
    corpus = asked.get("corpus") or {}
    try:
        read = CorpusSpec.model_validate({"source": corpus} if isinstance(corpus, str) else corpus)
        return f"study {_shape(short_name(asked['model']), read)}"
    except ValidationError:
        return "study"


def _shape(model: str, corpus: CorpusSpec) -> str:
    return f"{model} {corpus.num_sequences}x{corpus.sequence_length} {corpus_name(corpus)}"


def corpus_name(corpus: CorpusSpec) -> str:
    """`python-docs`, `fineweb-edu`, `book.txt`: as it was asked for, for who asked."""
    return short_model_name(corpus.source)


@functools.cache
def _words(name: str) -> frozenset[str]:
    """The words of a list of the package that the server takes its names from, with those of the lists within it."""
    from coolname.data import config

    found: Any = config.get(name) or {}
    return frozenset(found.get("words", ())).union(*(_words(other) for other in found.get("lists", ())))


@functools.cache
def _form_words() -> tuple[frozenset[str], frozenset[str]]:
    """(places, endings) of the names that the form proposes; empty where the pages are not installed, or have other words."""
    for path in sorted((Path(prefect.__module_path__) / "server" / "ui" / "assets").glob("index-*.js")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = path.read_text()
            places, endings = _PLACES.search(text), _ENDINGS.search(text)
            if places and endings:
                return frozenset(places[1].split(".")) - {""}, frozenset(endings[1].split("."))
    return frozenset(), frozenset()
