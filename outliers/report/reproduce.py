"""How a study came about, for people: the day, and the command that makes it again.

It takes the spec and the provenance of a manifest, which are untrusted: what is not a spec of ours gives no command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from outliers.spec import LOCAL_PREFIX, StudySpec
from outliers.spec.options import study_words

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
MAX_DAYS = 64


def reproduce_command(spec: Mapping[str, Any] | None) -> str | None:
    """The command line that asks for the same study, quoted for a shell; None where the spec is not one of this version.

    A folder of the person who ran it is named by its hash, `local:...`: it must be replaced by the folder.
    """
    try:
        given = StudySpec.model_validate(dict(spec or {}))
    except (ValidationError, ValueError, TypeError):
        return None
    return command_of(given)


def command_of(spec: StudySpec, instead: Mapping[tuple[str, str], str] | None = None) -> str:
    """The command line that asks for a study. instead: other words for a field's value, by (part, field)."""
    if spec.model.id.startswith(("builtin:", LOCAL_PREFIX)):  # their revision is a hash of files, which no option takes
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"revision": None})})
    return shlex.join(study_words(spec, instead))


def days(provenance: Mapping[str, Any]) -> str:
    """The days (UTC) on which the model was run, `2026-03-01` or `2026-03-01 to 2026-03-04`; empty where not recorded."""
    runs = provenance.get("extraction")
    found = [run.get("date") for run in runs[:MAX_DAYS] if isinstance(run, Mapping)] if isinstance(runs, list) else []
    known = sorted({day for day in found if isinstance(day, str) and _DAY.fullmatch(day)})
    return known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}" if known else ""


UNITS = (
    "Activations have no unit. Layers, features, sequences and positions count from 0. A share is of all tokens, or of all "
    "layers that were read. Bytes: 1 GB is 10^9 bytes. Times are seconds."
)
