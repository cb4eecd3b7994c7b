"""The mistakes in a SWEEP.toml in words: where, who wrote it, what is allowed, and what was likely meant.

Knows the fields and the usual slips of TOML; decides nothing. Before it: pydantic's errors. After it: `sweep`, which
raises them as one BadInput with a line a mistake.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from outliers.names import nearest
from outliers.spec import CaptureSpec, ComputeSpec, CorpusSpec, CriteriaSpec, ModelSpec, StudySpec

PARTS: dict[str, type[BaseModel]] = {
    "model": ModelSpec,
    "corpus": CorpusSpec,
    "capture": CaptureSpec,
    "criteria": CriteriaSpec,
    "compute": ComputeSpec,
}
OF_THE_SWEEP = ("parallel", "stagger_seconds", "needs")
"""Fields that stand once, above all tables; below a table's line they are taken for that table's."""


def errors_of(error: ValidationError) -> list[Any]:
    """Its mistakes, as pydantic has them."""
    return list(error.errors(include_url=False))


def lines(error: ValidationError, place: str, kind: type[BaseModel]) -> str:
    """All mistakes, a line each."""
    return "\n".join(f"{place}: {told(item, kind)}" for item in errors_of(error))


def holds(content: dict[str, Any], path: tuple[str, ...]) -> bool:
    """Whether nested dictionaries have a value at a path."""
    here: Any = content
    for step in path:
        if not isinstance(here, dict) or step not in here:
            return False
        here = here[step]
    return True


def origin(item: Any, layers: dict[str, dict[str, Any]], entry: dict[str, Any]) -> str:
    """Who wrote the value that is wrong: the last layer that holds it; for what is missing, the study."""
    path = tuple(step for step in item["loc"] if isinstance(step, str))
    study = next(name for name in layers if name.startswith("study"))
    known = f"{study} ({entry['name']})" if isinstance(entry.get("name"), str) else study
    for length in range(len(path), 0, -1):
        for name in reversed(layers):
            if item["type"] != "missing" and holds(layers[name], path[:length]):
                return known if name == study else name
    return known


def told(item: Any, kind: type[BaseModel]) -> str:
    """One mistake: the field, what is wrong, what was given, and what is known where it is unknown."""
    path = [str(step) for step in item["loc"]]
    if item["type"] == "missing" and path[:1] == ["model"]:
        return "model is missing: a hub id, a folder, a .gguf file, or builtin:smollm2"
    if item["type"] == "extra_forbidden":
        above = kind if len(path) == 1 else PARTS.get(path[0], kind)
        known = list(above.model_fields)
        meant = _elsewhere(path, item["input"], kind) or nearest(path[-1], known)
        return f"{'.'.join(path)} is no field{meant}; known: {', '.join(known)}"
    slip = _slip(path, item["input"], kind)
    if slip is not None:
        return f"{'.'.join(path)}: {slip}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = "" if item["type"] in ("value_error", "missing") else f" (given: {shown(item['input'])})"
    return f"{'.'.join(path) or 'study'}: {message}{given}"


def shown(value: Any) -> str:
    """A value as it was written, without the user and password of an address: a run's page shows what is said here."""
    return re.sub(r"://[^/\s'\"]*@", "://...@", repr(value))


def _elsewhere(path: list[str], value: Any, kind: type[BaseModel]) -> str:
    """Where a field belongs that is none here."""
    name = path[-1]
    if kind is StudySpec and len(path) == 1 and name in OF_THE_SWEEP:
        return " of a study: write it above the first table"
    owners = [f"{part}.{name}" for part, fields in PARTS.items() if name in fields.model_fields]
    of_a_study = owners[:1] or [name] * (name in StudySpec.model_fields)
    if len(path) > 1 or not of_a_study:
        return ""
    if kind is StudySpec:
        return f" (did you mean {of_a_study[0]}?)"
    table = f"[defaults.{name}]" if isinstance(value, dict) else f"{of_a_study[0]} below [defaults]"
    return f" of the sweep: write {table}, or into a [[study]]"


def _slip(path: list[str], value: Any, kind: type[BaseModel]) -> str | None:
    """What was likely meant, where a value is of a wrong shape."""
    if kind is not StudySpec:
        if path == ["study"]:
            return "write [[study]], in double brackets, once for each study"
        if path in (["defaults"], ["matrix"]) and isinstance(value, list):
            return f"write [{path[0]}], in single brackets: there is one"
        if len(path) == 2 and path[0] == "matrix" and not isinstance(value, (list, tuple)):
            return f"takes a list of values: {path[1]} = [{shown(value)}]"
        if path[:1] == ["study"] and len(path) == 2 and not isinstance(value, dict):
            return f"a study is a table: write [[study]], and below it model = {shown(value)}"
        return None
    if len(path) == 1 and path[0] in PARTS and isinstance(value, list):
        if value and all(isinstance(one, dict) for one in value):
            return f"write [study.{path[0]}], in single brackets: a study has one"
        return f"one for a study; several go into [matrix], {path[0]} = {shown(value)}"
    return None
