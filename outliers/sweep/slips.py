"""Messages for the mistakes in a SWEEP.toml: where, in which section, what is allowed, and what was probably meant.

It turns pydantic's errors into lines, and knows the fields and the usual slips of TOML. `sweep` raises them as one BadInput.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from outliers.names import nearest
from outliers.spec import PARTS, StudySpec

OF_THE_SWEEP = ("parallel", "stagger_seconds", "needs")
"""Fields that belong above all tables; below the header of a table, TOML reads them as fields of that table."""


def errors_of(error: ValidationError) -> list[Any]:
    """The mistakes of a validation, as pydantic's dictionaries."""
    return list(error.errors(include_url=False))


def lines(error: ValidationError, place: str, kind: type[BaseModel]) -> str:
    """All mistakes, one line each."""
    return "\n".join(f"{place}: {format_mistake(item, kind)}" for item in errors_of(error))


def holds(content: dict[str, Any], path: tuple[str, ...]) -> bool:
    """Whether nested dictionaries have a value at a path."""
    here: Any = content
    for step in path:
        if not isinstance(here, dict) or step not in here:
            return False
        here = here[step]
    return True


def origin(item: Any, layers: dict[str, dict[str, Any]], entry: dict[str, Any]) -> str:
    """The section that has the wrong value: the last layer that holds it; for a missing value, the study."""
    path = tuple(step for step in item["loc"] if isinstance(step, str))
    study = next(name for name in layers if name.startswith("study"))
    known = f"{study} ({entry['name']})" if isinstance(entry.get("name"), str) else study
    for length in range(len(path), 0, -1):
        for name in reversed(layers):
            if item["type"] != "missing" and holds(layers[name], path[:length]):
                return known if name == study else name
    return known


def format_mistake(item: Any, kind: type[BaseModel]) -> str:
    """One mistake as a line: the field, what is wrong, what was given, and the known fields where it is unknown."""
    path = [str(step) for step in item["loc"]]
    if item["type"] == "missing" and path[:1] == ["model"]:
        return "model is missing: a hub id, a folder, a .gguf file, or builtin:smollm2"
    if item["type"] == "extra_forbidden":
        above = kind if len(path) == 1 else PARTS.get(path[0], kind)
        known = list(above.model_fields)
        meant = _elsewhere(path, item["input"], kind) or nearest(path[-1], known)
        return f"{'.'.join(path)} is not a field{meant}; known: {', '.join(known)}"
    slip = _slip(path, item["input"], kind)
    if slip is not None:
        return f"{'.'.join(path)}: {slip}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = "" if item["type"] in ("value_error", "missing") else f" (given: {format_value(item['input'])})"
    return f"{'.'.join(path) or 'study'}: {message}{given}"


def format_value(value: Any) -> str:
    """A value as written, without the user and password of an address: a run's page shows these messages."""
    return re.sub(r"://[^/\s'\"]*@", "://...@", repr(value))


def _elsewhere(path: list[str], value: Any, kind: type[BaseModel]) -> str:
    """Where an unknown field belongs, as the end of a message; empty where that is unknown too."""
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
    """What was probably meant, where a value has the wrong shape; None where that is unknown."""
    if kind is not StudySpec:
        if path == ["study"]:
            return "write [[study]], in double brackets, once for each study"
        if path in (["defaults"], ["matrix"]) and isinstance(value, list):
            return f"write [{path[0]}], in single brackets: there is one"
        if len(path) == 2 and path[0] == "matrix" and not isinstance(value, (list, tuple)):
            return f"takes a list of values: {path[1]} = [{format_value(value)}]"
        if path[:1] == ["study"] and len(path) == 2 and not isinstance(value, dict):
            return f"a study is a table: write [[study]], and below it model = {format_value(value)}"
        return None
    if len(path) == 1 and path[0] in PARTS and isinstance(value, list):
        if value and all(isinstance(one, dict) for one in value):
            return f"write [study.{path[0]}], in single brackets: a study has one"
        return f"one for a study; several go into [matrix], {path[0]} = {format_value(value)}"
    return None
