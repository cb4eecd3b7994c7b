"""What a host answers, read as hostile input: one bounded model for each question, and an error that names the host.

No answer is trusted to be complete, short or of the right kind. Control characters in its text are made visible.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from outliers.errors import JobFailed, from_record
from outliers.hardware import Facts, Gpu
from outliers.untrusted.bounds import LARGEST, NAME_CHARS, PATH_CHARS, RESULT_BYTES, parse_json
from outliers.untrusted.visible import cut, last_drawn, visible, visible_line

MOST_SECONDS = 1e9
"""Thirty years: no lease is longer."""
_RESULT_VALUES = 2000
_RESULT_DEPTH = 6
_SHOWN_CHARS = 500


def _name(text: str) -> str:
    return visible_line(text, NAME_CHARS)


def _path(text: str) -> str:
    if not text.startswith("/") or text != visible_line(text, PATH_CHARS):
        raise ValueError("it is not the full path of a file")
    return text


Name = Annotated[str, Field(max_length=4 * NAME_CHARS), AfterValidator(_name)]
FullPath = Annotated[str, Field(max_length=PATH_CHARS), AfterValidator(_path)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Seconds = Annotated[float, Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class _Answer(BaseModel):
    """A newer or older program there may add to its answers; that is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Gpu(_Answer):
    name: Name
    total_bytes: Count
    reported: Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(min_length=2, max_length=2)] | None = None


class _Facts(_Answer):
    cpus: Annotated[int, Field(ge=1, le=1_000_000)]
    ram_bytes: Count
    ram_available_bytes: Count
    disk_free_bytes: Count
    gpus: Annotated[list[_Gpu], Field(max_length=1024)]
    python: Name


class _FactsAnswer(_Answer):
    facts: _Facts
    instance_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Lease(_Answer):
    left: Seconds
    holders: Annotated[dict[Name, Seconds], Field(max_length=10_000)]


class _HoldFacts(_Lease, _FactsAnswer):
    """Of `hold` that asks for facts too."""


class _Held(_Lease):
    running: Annotated[list[Name], Field(max_length=10_000)]


class _Start(_Answer):
    name: Id
    attempt: Annotated[int, Field(ge=1, lt=1_000_000_000)]
    folder: FullPath


class _Status(_Answer):
    status: Literal["running", "done", "failed", "cancelled", "lost"]


class _Size(_Answer):
    whole: bool
    part: Count


class _Capture(_Answer):
    capture_id: Name
    model: Name
    done: Count
    counted: Count = 0
    of_sequences: Count
    layer_batches: Count = 0
    of_layer_batches: Count = 0
    bytes: Count


class _Captures(_Answer):
    captures: Annotated[list[_Capture], Field(max_length=20_000)]


class _Removed(_Answer):
    removed: Annotated[dict[Name, Count], Field(max_length=20_000)]


class _State(_Answer):
    capture: bool
    summary: bool
    results: bool


class _Error(_Answer):
    kind: str
    message: str


_MODELS: dict[str, type[_Answer]] = {
    "facts": _FactsAnswer,
    "hold": _Lease,
    "hold facts": _HoldFacts,
    "leave": _Lease,
    "release": _Lease,
    "held": _Held,
    "start": _Start,
    "status": _Status,
    "result": _Answer,
    "cancel": _Status,
    "size": _Size,
    "settle": _Answer,
    "captures": _Captures,
    "remove_captures": _Removed,
    "state": _State,
}


def parse_answer(verb: str, code: int, stdout: bytes, stderr: str, host: str) -> dict[str, Any]:
    """The agent's answer to `verb`, its text made visible. Raises the error in it; JobFailed, which names the host, where
    it is missing or not an answer to that."""
    line = stdout.strip().rpartition(b"\n")[2]
    try:
        found = parse_json(line)
    except ValueError as error:
        said = last_drawn(stderr.strip().rpartition("\n")[2].encode(errors="replace")) or last_drawn(
            line[:_SHOWN_CHARS]
        )
        last = visible_line(said, _SHOWN_CHARS) or f"exit code {code}"
        why = f": {error}" if line else ""
        raise JobFailed(f"{host} can't answer: {last}{cut(why, _SHOWN_CHARS)}") from error
    if isinstance(found, dict) and found.get("error"):
        record = _checked(_Error, found["error"], verb, host)
        raise from_record(record["kind"], record["message"])
    return _checked(_MODELS[verb], found, verb, host)


def _checked(model: type[_Answer], found: object, verb: str, host: str) -> dict[str, Any]:
    try:
        return model.model_validate(found).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise JobFailed(
            f"{host} answers '{verb}' with something else than an answer to it ({_why(error)}): another program may answer there"
        ) from error


def _why(error: ValidationError) -> str:
    """The first fault of an answer, in one line that shows at most a part of it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return visible_line(f"{place}: {first['msg']}" if place else first["msg"], _SHOWN_CHARS)


def read_facts(record: dict[str, Any]) -> Facts:
    """Facts as an agent sends them. JobFailed where they are malformed."""
    known = _checked(_Facts, record, "facts", "the host")
    gpus = tuple(Gpu(one["name"], one["total_bytes"], _pair(one.get("reported"))) for one in known["gpus"])
    return Facts(**{**known, "gpus": gpus})


def _pair(found: list[int] | None) -> tuple[int, int] | None:
    return None if found is None else (found[0], found[1])


def parse_result(data: bytes, job: str) -> dict[str, Any]:
    """A step's own report, result.json: names and plain values, part of what is published of a study.

    JobFailed where it is not a JSON object of plain values, or holds more than any step says.
    """
    try:
        if len(data) > RESULT_BYTES:
            raise ValueError(f"it has more than {RESULT_BYTES:,} bytes")
        found = parse_json(data, _RESULT_DEPTH)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
        count = [0]
        result: dict[str, Any] = _plain(found, count)
        digest = result.get("results_digest", "0" * 64)
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError("its results_digest is not a sha256")
    except ValueError as error:
        raise JobFailed(f"job {job} left no readable result: {error}") from error
    return result


def _plain(value: Any, count: list[int]) -> Any:
    """A value of JSON with its text made visible; ValueError where it holds too much, or a number that is too large."""
    count[0] += 1
    if count[0] > _RESULT_VALUES:
        raise ValueError(f"it holds more than {_RESULT_VALUES:,} values")
    if isinstance(value, dict):
        return {visible_line(name, NAME_CHARS): _plain(item, count) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, count) for item in value]
    if isinstance(value, str):
        return visible(cut(value, PATH_CHARS))
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ValueError("a number is too large")
    return value
