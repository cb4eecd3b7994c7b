"""The StudySpec as options of the command: every field once, by its own name, with its own description.

Values stay text until pydantic reads them, so the command, the Prefect form and a spec file refuse the same things in
the same words.
"""

from __future__ import annotations

import argparse
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from outliers.errors import BadInput
from outliers.names import nearest
from outliers.spec import PARTS, StudySpec
from outliers.spec.options import REPEATED, option_name

ALSO = {("compute", "grace_seconds"): "--grace"}
"""A second, shorter spelling."""


def add_spec_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of a StudySpec, grouped by its part."""
    for part, model in PARTS.items():
        group = parser.add_argument_group(part, (model.__doc__ or "").split("\n")[0])
        for name, field in model.model_fields.items():
            _add(group, part, name, field)
    group = parser.add_argument_group("results", "Where they go, and what of the text they show.")
    for name, field in StudySpec.model_fields.items():
        if name not in PARTS:
            _add(group, "", name, field)
    parser.add_argument("--spec", type=Path, metavar="FILE", help="begin with the StudySpec in this JSON file")


def add_track_option(parser: argparse.ArgumentParser) -> None:
    """--track, which is no part of a study: it is done once the study is finished."""
    parser.add_argument(
        "--track",
        metavar="mlflow:URI",
        help="log the finished study at this MLflow server too: mlflow:https://host:5000 or mlflow:file:///folder; it gets what "
        "would be published (needs outlier-features[mlflow]; keys come from the environment)",
    )


def add_part_options(parser: argparse.ArgumentParser, parts: tuple[str, ...], leave_out: tuple[str, ...] = ()) -> None:
    """Add the options of some parts alone, for a command whose study is known."""
    for part in parts:
        model = PARTS[part]
        group = parser.add_argument_group(part, (model.__doc__ or "").split("\n")[0])
        for name, field in model.model_fields.items():
            if name not in leave_out:
                _add(group, part, name, field)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--workspace and --json, as the commands have them that read what a workspace holds."""
    parser.add_argument("--workspace", metavar="DIR", help="default: $OUTLIERS_WORKSPACE, else ~/.outliers")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def add_plain_option(parser: argparse.ArgumentParser) -> None:
    """--plain, for a command that prints a table."""
    parser.add_argument("--plain", action="store_true", help="separate the cells of the table by tabs, for cut and awk")


def _add(group: Any, part: str, name: str, field: FieldInfo) -> None:
    text = (field.description or "").replace("%", "%%")
    default = field.default
    if not field.is_required() and default not in (None, "", False, ()) and "default" not in text:
        shown = (
            ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in default)
            if isinstance(default, tuple)
            else default
        )
        text += f" (default: {shown})"
    dest = f"{part}.{name}" if part else name
    if field.annotation is bool:
        group.add_argument(
            option_name(part, name), dest=dest, action="store_const", const=True, default=None, help=text
        )
    elif name in REPEATED:
        text += " (may be given again)"
        group.add_argument(
            option_name(part, name), dest=dest, action="append", default=None, metavar="SITE=PATTERN", help=text
        )
    else:
        spellings = [option_name(part, name), *([ALSO[part, name]] if (part, name) in ALSO else [])]
        group.add_argument(*spellings, dest=dest, default=None, metavar=_metavar(field.annotation), help=text)


def _metavar(annotation: Any) -> str:
    choices = [c for a in _leaves(annotation) if typing.get_origin(a) is typing.Literal for c in typing.get_args(a)]
    kinds = [a for a in _leaves(annotation) if isinstance(a, type)]
    if typing.get_origin(annotation) is tuple or any(typing.get_origin(a) is tuple for a in _leaves(annotation)):
        return "A,B,..."
    if choices:
        return "{" + ",".join(choices) + "}"
    return {int: "N", float: "X"}.get(kinds[0] if kinds else str, "TEXT")


def _leaves(annotation: Any) -> list[Any]:
    """The members of a union, without None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [leaf for a in typing.get_args(annotation) if a is not type(None) for leaf in _leaves(a)]
    return [annotation]


def read_spec(arguments: argparse.Namespace) -> StudySpec:
    """The StudySpec of parsed options, over the one in --spec; BadInput names the option and what it takes."""
    content = _from_file(arguments.spec) if arguments.spec else {}
    for dest, value in vars(arguments).items():
        part, _, name = dest.rpartition(".")
        if value is None or (part not in PARTS and dest not in StudySpec.model_fields):
            continue
        if part:
            # a part written as a bare string in the file stands for its first field
            if isinstance(content.get(part), str):
                content[part] = {next(iter(PARTS[part].model_fields)): content[part]}
            content.setdefault(part, {})[name] = _split(PARTS[part].model_fields[name], value)
        else:
            content[dest] = value
    if "model" not in content:
        raise BadInput("--model is missing: a hub id, a folder, a .gguf file, or builtin:smollm2")
    try:
        return StudySpec.model_validate(content)
    except ValidationError as error:
        raise BadInput("\n".join(_explain(item) for item in error.errors(include_url=False))) from error


def overlaid(content: dict[str, Any], arguments: argparse.Namespace, parts: tuple[str, ...]) -> StudySpec:
    """A StudySpec from `content` with the options of some parts over it. BadInput names the option and what it takes."""
    for dest, value in vars(arguments).items():
        part, _, name = dest.partition(".")
        if value is not None and part in parts and name:
            content.setdefault(part, {})[name] = _split(PARTS[part].model_fields[name], value)
    try:
        return StudySpec.model_validate(content)
    except ValidationError as error:
        raise BadInput("\n".join(_explain(item) for item in error.errors(include_url=False))) from error


def _from_file(path: Path) -> dict[str, Any]:
    from outliers.study.prepare import parse_spec

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"--spec {path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"--spec {path} holds no JSON object")
    parse_spec(content, str(path))
    return content


def _split(field: FieldInfo, value: Any) -> Any:
    """A tuple is written with commas; `all` stands for itself."""
    if isinstance(value, list):
        return [item for text in value for item in _split(field, text)]
    takes_tuple = any(typing.get_origin(a) is tuple for a in _leaves(field.annotation))
    if not takes_tuple or not isinstance(value, str) or value == "all":
        return value
    return [item.strip() for item in value.split(",") if item.strip()]


def _explain(item: Any) -> str:
    """One mistake: the option, what is wrong, what was given."""
    place = [str(step) for step in item["loc"]]
    message = str(item["msg"]).removeprefix("Value error, ")
    if not place:
        return message
    part, name = (place[0], place[1]) if place[0] in PARTS and len(place) > 1 else ("", place[0])
    if item["type"] == "literal_error":
        message += nearest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    given = "" if isinstance(item["input"], dict) or item["type"] == "value_error" else f" (given: {item['input']})"
    return f"{option_name(part, name)}: {message}{given}"
