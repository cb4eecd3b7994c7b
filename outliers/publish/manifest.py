"""The manifest: what a published study consists of, byte for byte, and the few numbers by which it is listed.

It is written last, into the results folder and at the target: a study without a manifest is not finished. The
`results_digest` in it is over the numbers, not the bytes, so that two runs of one study can be compared.
It knows nothing of targets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outliers.errors import PublishRefused
from outliers.files.atomic import write_atomic
from outliers.files.beneath import read_beneath
from outliers.files.parquet import numbers_of, read_parquet
from outliers.publish.allowlist import (
    EXPERTS,
    FEATURES,
    MANIFEST,
    MAX_FILE_BYTES,
    QUANTIZATION,
    ROUTER,
    SUMMARY,
    TOKENS,
    numbers_in,
)
from outliers.results.schema import (
    EXPERTS_NULLABLE,
    EXPERTS_SCHEMA,
    FEATURES_SCHEMA,
    MOMENT_COLUMNS,
    NULLABLE_COLUMNS,
    QUANTIZATION_NULLABLE,
    QUANTIZATION_SCHEMA,
    ROUTER_NULLABLE,
    ROUTER_SCHEMA,
    first_error,
)
from outliers.spec import digest
from outliers.untrusted.strict_json import strict_json

MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 256_000
HEADLINE_FEATURES = 20
FOLDER_CHARACTERS = 12
MAX_FILES = 100
MAX_DEPTH, MAX_TEXT = 12, 4_096
"""How deep the free parts of a manifest may be nested, and characters of one text in them."""

_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(max_length=300)]
_Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _File(_Part):
    path: _Text
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: _Hex


_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Name = Annotated[str, Field(max_length=300)]


class _Headline(_Part):
    model: _Name
    num_systematic: _Count
    systematic: Annotated[list[_Count], Field(max_length=HEADLINE_FEATURES)]
    reading: _Name
    site: _Name
    num_tokens: _Count
    num_layers: _Count
    hidden_size: _Count


class _Manifest(_Part):
    schema_version: Literal[1]
    study_id: _Id
    capture_id: _Id
    results_digest: _Hex
    folder: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    files: Annotated[list[_File], Field(max_length=MAX_FILES)]
    headline: _Headline
    spec: dict[str, Any]
    provenance: dict[str, Any]


def results_digest(results: Path) -> str:
    """sha256 (hex) of a study's numbers: equal for equal results, whatever wrote the files.

    Covers summary.json and tokens.json as parsed, and the integer and selection columns of features.parquet in row
    order; not the moments, which agree to 1e-12 only. quantization.parquet, where there is one, counts whole: its sums do not
    depend on the number of threads. So do experts.parquet and router.parquet, which hold no sum of floats; what summary.json
    attributes to experts is left out, as moments are, and so is pictures.json, which is no answer. Raises PublishRefused where a
    file is missing or unreadable.
    """
    try:
        return digest_of({name: read_beneath(results, name, MAX_FILE_BYTES) for name in numbers_in(results)})
    except OSError as error:
        raise PublishRefused(f"{error.filename} can't be read: {error.strerror}; analyze the capture again") from error


def digest_of(contents: Mapping[str, bytes]) -> str:
    """`results_digest` from the bytes of the numbers, by name."""
    payload: dict[str, Any] = {}
    for name in (SUMMARY, TOKENS):
        try:
            payload[name] = strict_json(contents[name])
        except ValueError as error:
            raise PublishRefused(f"{name} is not readable JSON: {error}; analyze the capture again") from error
    try:
        table = read_parquet(contents[FEATURES])
        kept = [name for name in FEATURES_SCHEMA.names if name not in MOMENT_COLUMNS]
        payload[FEATURES] = [table.num_rows, *([name, _column_digest(name, table[name])] for name in kept)]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise PublishRefused(f"{FEATURES} is not a table of features: {error}; analyze the capture again") from error
    for name, schema in _WHOLE.items():
        if name in contents:
            payload[name] = _table_digest(name, schema, contents[name])
    experts = payload[SUMMARY].get("experts")
    if isinstance(experts, dict):
        numbers = {key: value for key, value in experts.items() if key != "attribution"}
        payload[SUMMARY] = payload[SUMMARY] | {"experts": numbers}
    return digest(payload)


_WHOLE = {QUANTIZATION: QUANTIZATION_SCHEMA, EXPERTS: EXPERTS_SCHEMA, ROUTER: ROUTER_SCHEMA}
"""Tables that count with every column."""
_NULLABLE = {*NULLABLE_COLUMNS, *QUANTIZATION_NULLABLE, *EXPERTS_NULLABLE, *ROUTER_NULLABLE}
_OF = {QUANTIZATION: "errors", EXPERTS: "experts", ROUTER: "routers"}


def _table_digest(name: str, schema: Any, data: bytes) -> list[Any]:
    try:
        table = read_parquet(data)
        return [table.num_rows, *([column, _column_digest(column, table[column])] for column in schema.names)]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise PublishRefused(f"{name} is not a table of {_OF[name]}: {error}; analyze the capture again") from error


def _column_digest(name: str, column: Any) -> str:
    """sha256 (hex) of a column's values in row order, independent of chunks, encoding and this machine's byte order."""
    flat = column.combine_chunks()
    hasher = hashlib.sha256()
    if column.null_count:
        if name not in _NULLABLE:
            raise ValueError(f"the column {name} has nulls")
        # which rows have no value, then the others' values
        hasher.update(np.packbits(numbers_of(flat.is_null())).tobytes())
        flat = flat.drop_null()
    if pa.types.is_list(flat.type):
        lengths = np.asarray([len(row) for row in flat.to_pylist()], dtype="<i8")
        hasher.update(lengths.tobytes())
        flat = flat.flatten()
    if pa.types.is_string(flat.type):
        hasher.update(json.dumps(flat.to_pylist()).encode())
    else:
        values = numbers_of(flat)
        hasher.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return hasher.hexdigest()


def build_manifest(files: Mapping[str, bytes], *, spec: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the files of a study, by path; `spec` and `provenance` are published in it as they are.

    Raises PublishRefused where `spec` and `provenance` are more than metadata.
    """
    summary = json.loads(files[SUMMARY])
    listed = file_list(files)
    check_plain(spec, "spec")
    check_plain(provenance, "provenance")
    manifest = {
        "schema_version": MANIFEST_VERSION,
        "study_id": summary["study_id"],
        "capture_id": summary["capture_id"],
        "results_digest": digest_of(files),
        "folder": folder_of(listed),
        "files": listed,
        "headline": headline_of(summary),
        "spec": spec,
        "provenance": provenance,
    }
    return parse_manifest(dump_manifest(manifest), summary["study_id"])


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """PublishRefused where a manifest's free part is more than names, numbers and short texts."""
    if depth > MAX_DEPTH:
        raise PublishRefused(f"{where} of a manifest is nested more than {MAX_DEPTH} deep; shorten it")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_plain(str(key), where, depth)
            check_plain(inner, f"{where}.{str(key)[:60]}", depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner, where, depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise PublishRefused(f"{where} of a manifest has a text of {len(value):,} characters, at most {MAX_TEXT:,}")
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise PublishRefused(f"{where} of a manifest has a number of {value.bit_length():,} bits, at most 63")


def headline_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers by which a study is listed, from its summary.json."""
    return {
        "model": summary["model"]["id"],
        "num_systematic": len(summary["systematic"]),
        "systematic": [row["feature"] for row in summary["systematic"][:HEADLINE_FEATURES]],
        "reading": summary["criteria"]["reading"],
        "site": summary["criteria"]["site"],
        "num_tokens": summary["corpus"]["num_tokens"],
        "num_layers": summary["model"]["num_layers"],
        "hidden_size": summary["model"]["hidden_size"],
    }


def file_list(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The manifest's `files`, by path."""
    return [
        {"path": path, "size": len(files[path]), "sha256": hashlib.sha256(files[path]).hexdigest()}
        for path in sorted(files)
    ]


def folder_of(listed: list[dict[str, Any]]) -> str:
    """The name of the published folder of exactly these files."""
    return digest(listed)[:FOLDER_CHARACTERS]


def dump_manifest(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest, as written and published; PublishRefused where it is not plain JSON of limited size."""
    try:
        data = json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise PublishRefused(f"the manifest is not plain JSON: {error}; give spec and provenance as such") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise PublishRefused(
            f"the manifest has {len(data):,} bytes, at most {MAX_MANIFEST_BYTES:,} are published; shorten provenance"
        )
    return data


def parse_manifest(data: bytes, origin: str) -> dict[str, Any]:
    """The manifest in `data`; PublishRefused, naming `origin`, where it is malformed or of a newer version."""
    try:
        found = strict_json(data)
        version = found.get("schema_version") if isinstance(found, dict) else None
        if isinstance(version, int) and version > MANIFEST_VERSION:
            raise PublishRefused(
                f"the manifest of {origin} has schema_version {version}, this program reads up to {MANIFEST_VERSION}; "
                "update outlier-features"
            )
        _Manifest.model_validate_json(data)
    except ValidationError as error:
        raise PublishRefused(
            f"the manifest of {origin} is malformed: {first_error(error)}; remove it and run again"
        ) from error
    except ValueError as error:
        raise PublishRefused(f"the manifest of {origin} is not JSON: {error}; remove it and run again") from error
    return dict(found)


def write_manifest(results: Path, manifest: dict[str, Any]) -> Path:
    """Write manifest.json into `results`, last and whole; returns its path. PublishRefused for a malformed one."""
    data = dump_manifest(manifest)
    parse_manifest(data, str(results))
    write_atomic(results / MANIFEST, data)
    return results / MANIFEST


def read_manifest(results: Path) -> dict[str, Any] | None:
    """The manifest in `results`; None where there is none. Raises PublishRefused where it is malformed."""
    path = results / MANIFEST
    try:
        data = read_beneath(results, MANIFEST, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PublishRefused(f"{path} can't be read: {error.strerror or error}") from error
    return parse_manifest(data, str(path))


def slug_safe(name: str) -> bool:
    """Whether `name` can be one step of a published path: no slash, no dots that lead elsewhere."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) is not None
