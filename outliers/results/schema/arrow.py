"""The Arrow schema of a table, made from the model of its rows.

`arrow_schema(Model)` has one column a field, in the order of the fields. A string, int, float or list of these becomes
string, int64, float64 or list; `Int32` and `Float32` say that fewer bits are stored. Every column may hold nulls: which do not
is what a reader checks.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Union, get_args, get_origin

import pyarrow as pa
from typing_extensions import is_typeddict

Int32 = Annotated[int, pa.int32()]
Float32 = Annotated[float, pa.float32()]

_PLAIN = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def arrow_schema(model: type) -> Any:
    """The columns of a table whose rows are of `model`: a pydantic model, a dataclass or a TypedDict."""
    hints = typing.get_type_hints(model, include_extras=True)
    return pa.schema([(name, arrow_type(hints[name])) for name in field_names(model)])


def field_names(model: type) -> list[str]:
    """The names of the fields, those of the bases first."""
    fields = getattr(model, "model_fields", None)
    return list(typing.get_type_hints(model)) if fields is None else list(fields)


def is_optional(annotation: Any) -> bool:
    """Whether an annotation allows None."""
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return get_origin(bare) in (Union, types.UnionType) and type(None) in get_args(bare)


def arrow_type(annotation: Any) -> Any:
    """The type of a column. Raises TypeError for an annotation that no column has."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [item for item in arguments[1:] if isinstance(item, pa.DataType)]
        return own[0] if own else arrow_type(arguments[0])
    if origin in (Union, types.UnionType):
        (inner,) = (item for item in arguments if item is not type(None))
        return arrow_type(inner)
    if origin is typing.Literal:
        return pa.string()
    if origin in (list, tuple):
        return pa.list_(arrow_type(arguments[0]))
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if is_typeddict(annotation):
        hints = typing.get_type_hints(annotation, include_extras=True)
        return pa.struct([(name, arrow_type(hint)) for name, hint in hints.items()])
    raise TypeError(f"no column has the type {annotation}")
