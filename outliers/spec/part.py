"""The base of every section of a spec: frozen, without unknown fields, and with its bounds in its JSON schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _say_bounds(schema: dict[str, Any]) -> None:
    """Add to each description in a JSON schema what is allowed: Prefect's form checks bounds without showing them."""
    for field in schema.get("properties", {}).values():
        said: str = field.get("description", "")
        bounds: dict[str, float] = {}
        for option in (field, *field.get("anyOf", ())):
            bounds |= {name: option[name] for name in ("minimum", "exclusiveMinimum", "maximum") if name in option}
        low, above, high = (bounds.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
        texts = [f"{low:,} to {high:,}"] if low is not None and high is not None else []
        texts += [f"more than {above:g}"] if above is not None else []
        texts += [f"at least {low:,}"] if low is not None and high is None else []
        texts += [f"at most {high:,}"] if high is not None and low is None else []
        if texts and texts[0] not in said:
            field["description"] = f"{said}; {', '.join(texts)}"


class Part(BaseModel):
    """A frozen section of a spec: unknown fields are errors. A form shows a field under its own name."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        json_schema_extra=_say_bounds,
        field_title_generator=lambda name, info: name,
    )


def bare(field: str, *, takes_list: bool = False) -> BeforeValidator:
    """A section written as a bare string stands for its first field; with `takes_list` one written as a list, too."""
    kinds = (str, list, tuple) if takes_list else (str,)
    return BeforeValidator(lambda value: {field: value} if isinstance(value, kinds) else value)
