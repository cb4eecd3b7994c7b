"""Tables of Markdown from the descriptions of a model's fields: what docs/results.md says of a file is what its schema says."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from outliers.results.schema.arrow import arrow_type, field_names
from outliers.results.schema.pictures import KindName

_PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false"}


def markdown_table(model: type, *, arrow: bool = False) -> str:
    """One line a field: key, type, description. arrow: the types of Arrow columns instead of those of JSON."""
    hints = typing.get_type_hints(model, include_extras=True)
    lines = ["| column | type | what it holds |" if arrow else "| key | type | what it holds |", "|---|---|---|"]
    for name in field_names(model):
        kind = column_type(hints[name]) if arrow else json_type(hints[name])
        lines.append(f"| `{name}` | {kind} | {_description(model, name, hints[name])} |")
    return "\n".join(lines) + "\n"


def _description(model: type, name: str, hint: Any) -> str:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return str(model.model_fields[name].description)
    return next(str(item.description) for item in get_args(hint)[1:] if isinstance(item, FieldInfo))


def column_type(annotation: Any) -> str:
    """The type of an Arrow column in words."""
    kind = arrow_type(annotation)
    if pa.types.is_list(kind):
        inner = kind.value_type
        return f"list of {'struct' if pa.types.is_struct(inner) else inner}"
    return str(kind).replace("float", "float32") if kind == pa.float32() else str(kind).replace("double", "float64")


def json_type(annotation: Any) -> str:
    """The type of a value of JSON in words: `list of number or null`, `site: reading: list of integer`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return json_type(arguments[0])
    if origin in (Union, types.UnionType):
        inner = [json_type(item) for item in arguments if item is not type(None)]
        return " or ".join([*dict.fromkeys(inner), *(["null"] if type(None) in arguments else [])])
    if origin is Literal:
        return "text" if isinstance(arguments[0], str) else "integer"
    if origin is list:
        return f"list of {json_type(arguments[0])}"
    if origin is dict:
        return f"{_key(arguments[0])}: {json_type(arguments[1])}"
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_typeddict(annotation)):
        return f"`{annotation.__name__}`"
    return _PLAIN[annotation]


def _key(annotation: Any) -> str:
    """What the keys of an object are."""
    if annotation == KindName:
        return "kind"
    return "site" if "block" in get_args(annotation) else "reading"
