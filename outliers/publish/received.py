"""Numbers of a study, brought home from the machine that counted them: hostile input until they are checked.

Each of the few known files is asked for by its name and read as a regular file of limited size. It must pass its schema; the
study, model, corpus and criteria in it must be those that were asked for, and every text of the corpus the one that this
side's own corpus has there. Then the files are written anew from their values, so that no byte of the machine's own
is kept.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from outliers.errors import BadInput, JobFailed, PublishRefused
from outliers.events.stream import Reporter
from outliers.machines.base import Machine
from outliers.publish.allowlist import (
    EXPERTS,
    FEATURES,
    MAX_FILE_BYTES,
    NUMBERS,
    OPTIONAL,
    PICTURES,
    QUANTIZATION,
    ROUTER,
    SUMMARY,
    TOKENS,
    Numbers,
    check_numbers,
    number_names,
    read_regular,
)
from outliers.publish.manifest import digest_of
from outliers.publish.reporting import MADE, PROVENANCE, drop_numbers, place_study
from outliers.study.expert_shapes import ExpertShapes
from outliers.study.experts import expert_shapes
from outliers.study.prepare import Prepared
from outliers.untrusted.visible import visible_line
from outliers.workspace import Workspace

MAX_PROVENANCE_BYTES = 128_000
MAX_BYTES = (len(NUMBERS) + len(OPTIONAL)) * MAX_FILE_BYTES + MAX_PROVENANCE_BYTES
MAX_PROVENANCE_ITEMS = 4_000
MAX_PROVENANCE_TEXT = 400


def receive_study(
    prepared: Prepared, machine: Machine, workspace: Workspace, reporter: Reporter, digest: str | None = None
) -> dict[str, Any]:
    """Bring a study's numbers from `machine` into its results folder here; their digest and the number of its files.

    `digest`: that which the machine's step named. Raises JobFailed where the machine gives something else, or numbers that
    are not of this study; and as `reporting.place_study`.
    """
    place = f"captures/{prepared.capture_id}/summaries/{prepared.study_id}/{MADE}"
    with tempfile.TemporaryDirectory() as made:
        aside, numbered = Path(made) / MADE, number_names(asked_of(prepared))
        names = (*numbered, PROVENANCE)
        try:
            machine.download(place, aside, max_bytes=MAX_BYTES, max_files=len(names), names=names)
            numbers = check_received({name: read_regular(aside, name) for name in numbered}, prepared, workspace)
            known = read_provenance(read_regular(aside, PROVENANCE, MAX_PROVENANCE_BYTES))
        except (BadInput, PublishRefused, ValueError) as error:
            raise JobFailed(
                f"the numbers that {machine.name} gives of {prepared.title} are refused: {error}"
            ) from error
    if digest is not None and digest_of(numbers.files) != digest:
        raise JobFailed(
            f"{machine.name} said it counted {digest[:12]!r}, its numbers of {prepared.title} are "
            f"{digest_of(numbers.files)[:12]}: run the same again"
        )
    placed = place_study(prepared, workspace, numbers, known, reporter)
    if machine.workspace == str(workspace.root):
        drop_numbers(prepared, workspace)
    return placed


def asked_of(prepared: Prepared) -> tuple[str, ...]:
    """The optional numbers that a study asks for."""
    formats = (QUANTIZATION,) if prepared.spec.formats.formats else ()
    return (*formats, EXPERTS, ROUTER, PICTURES) if _shapes(prepared) else (*formats, PICTURES)


def check_received(files: dict[str, bytes], prepared: Prepared, workspace: Workspace) -> Numbers:
    """The numbers in `files`, written anew. ForbiddenFile where one is not what its name says, ValueError where they are of
    something else, or hold text that the corpus does not."""
    numbers = check_numbers(files)
    _check_study(numbers, prepared)
    _check_texts(numbers, prepared, workspace)
    return written_anew(numbers)


def written_anew(numbers: Numbers) -> Numbers:
    """The same values in the bytes that this program writes: no spaces, keys in order, no metadata, no padding."""
    from outliers.files.parquet import parquet_bytes, read_parquet
    from outliers.results.schema import EXPERTS_SCHEMA, FEATURES_SCHEMA, QUANTIZATION_SCHEMA, ROUTER_SCHEMA
    from outliers.results.write import json_bytes

    table = read_parquet(numbers.files[FEATURES])
    if table.column_names == FEATURES_SCHEMA.names:
        table = table.cast(FEATURES_SCHEMA)
    files = {
        SUMMARY: json_bytes(numbers.summary),
        TOKENS: json_bytes(numbers.tokens),
        FEATURES: parquet_bytes(table.replace_schema_metadata(None)),
    }
    for name, schema in ((QUANTIZATION, QUANTIZATION_SCHEMA), (EXPERTS, EXPERTS_SCHEMA), (ROUTER, ROUTER_SCHEMA)):
        if name in numbers.files:
            own = read_parquet(numbers.files[name]).cast(schema)
            files[name] = parquet_bytes(own.replace_schema_metadata(None))
    if PICTURES in numbers.files:
        files[PICTURES] = json_bytes(json.loads(numbers.files[PICTURES]))
    return check_numbers(files)


def _check_study(numbers: Numbers, prepared: Prepared) -> None:
    """ValueError where the numbers name another study, model, corpus or criterion than was asked for."""
    from outliers.results.write import identity

    wanted = json.loads(json.dumps(identity(prepared)))
    for name, value in wanted.items():
        found = numbers.summary[name]
        kept = {key: found.get(key) for key in value} if isinstance(value, dict) else found
        if kept != value or (name in ("model", "corpus") and found.keys() != value.keys()):
            raise ValueError(f"{SUMMARY} says {name} {str(found)[:200]}, the study asks for {str(value)[:200]}")
    formats = (numbers.summary.get("quantization") or {}).get("formats", [])
    if formats != list(prepared.spec.formats.formats):
        raise ValueError(
            f"{SUMMARY} has errors of the formats {formats}, the study asks for {prepared.spec.formats.formats}"
        )
    _check_experts(numbers, prepared)
    if (numbers.tokens["text"], numbers.tokens["site"]) != (prepared.text, prepared.site):
        raise ValueError(f"{TOKENS} says text {numbers.tokens['text']} at {numbers.tokens['site']}")


def _shapes(prepared: Prepared) -> ExpertShapes | None:
    return expert_shapes(prepared.spec, prepared.model, prepared.layers)


def _check_experts(numbers: Numbers, prepared: Prepared) -> None:
    """ValueError where the numbers are of other experts than the study reads, or of none."""
    found, shapes = numbers.summary.get("experts"), _shapes(prepared)
    if (found is None) != (shapes is None):
        raise ValueError(
            f"{SUMMARY} says {'nothing of' if found is None else 'something of'} experts, the study asks otherwise"
        )
    if found is None or shapes is None:
        return
    wanted = {
        "read": "all" if shapes.values else "routing",
        "layers": list(shapes.layers),
        "experts": shapes.experts,
        "slots": shapes.slots,
        "shared": shapes.shared,
        "weights_inside": shapes.applied,
    }
    if (kept := {name: found[name] for name in wanted}) != wanted:
        raise ValueError(f"{SUMMARY} says of the experts {str(kept)[:200]}, the study asks for {str(wanted)[:200]}")


def _check_texts(numbers: Numbers, prepared: Prepared, workspace: Workspace) -> None:
    """ValueError where a token or the text around it is not what the corpus has there; without text there must be none."""
    from outliers.corpus.tokens import load_corpus
    from outliers.results.top_tokens import context

    listed = [row for name in ("massive", "massive_by_token") for row in numbers.summary.get(name) or ()]
    listed += _super_experts(numbers.summary.get("experts") or {})
    tokens = [row for feature in numbers.tokens["features"] for row in feature["top"]]
    tokens += numbers.tokens["massive"] or []
    shape = (prepared.corpus.num_sequences, prepared.corpus.sequence_length)
    if any(row["sequence"] >= shape[0] or row["position"] >= shape[1] for row in (*listed, *tokens)):
        raise ValueError(f"there is a token outside of the corpus's {shape[0]} sequences of {shape[1]}")
    if not prepared.text:
        if any(row.get(key) is not None for row in (*listed, *tokens) for key in ("token", "before", "after")):
            raise ValueError("there is text, and the text of this corpus is not to be published")
        return
    corpus = load_corpus(prepared.corpus, workspace)
    for row in (*listed, *tokens):
        own = context(prepared, corpus, row["sequence"], row["position"])
        if any(row[key] != own[key] for key in own.keys() & row.keys()):
            raise ValueError(
                f"the text at position {row['position']} of sequence {row['sequence']} is not the corpus's"
            )


def _super_experts(experts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows about experts that name a token."""
    rows = [experts.get("largest_output"), *(experts.get("super_experts") or {}).get("experts", ())]
    rows += (experts.get("super_experts_as_published") or {}).get("experts", ())
    return [row for row in rows if row is not None and row["sequence"] is not None]


def read_provenance(data: bytes) -> dict[str, Any]:
    """What a machine says of how its numbers were made: names, numbers and short texts, unprintable characters shown.

    Raises ValueError for anything else.
    """
    try:
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError(f"{PROVENANCE} is not an object")
        left = [MAX_PROVENANCE_ITEMS]
        plain = _plain(found, left, 0)
    except RecursionError as error:
        raise ValueError(f"{PROVENANCE} is nested too deep") from error
    return dict(plain)


def _plain(value: object, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > 6:
        raise ValueError(f"{PROVENANCE} has more than {MAX_PROVENANCE_ITEMS:,} values, or is nested more than 6 deep")
    if isinstance(value, dict):
        return {visible_line(key, 64): _plain(inner, left, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, left, depth + 1) for inner in value]
    if isinstance(value, str):
        return visible_line(value, MAX_PROVENANCE_TEXT)
    if isinstance(value, int | float) and not -(1 << 63) < value < 1 << 63:  # so neither is NaN
        raise ValueError(f"{PROVENANCE} has a number that no clock and no counter gives")
    return value
