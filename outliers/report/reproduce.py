"""How a study came about, for people: the day, the command that makes it again, and what to cite.

It takes the spec and the provenance of a manifest, which are untrusted: what is not a spec of ours gives no command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from outliers.results.schema import StudySummary
from outliers.spec import StudySpec

RENAMED = {("model", "id"): "model", ("corpus", "source"): "corpus", ("capture", "site_modules"): "site-module"}
"""Options that don't bear the name of their field (`flows.cli.options`)."""
ALWAYS = (("model", "dtype"), ("corpus", "num_sequences"), ("corpus", "sequence_length"))
"""Said even where they are the default: a default may change."""
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
    plain = StudySpec.model_validate({"model": {"id": given.model.id}, "corpus": {"source": given.corpus.source}})
    words = ["outliers", "study"]
    mine, theirs = given.model_dump(mode="json"), plain.model_dump(mode="json")
    for part, value in mine.items():
        if part in ("compute", "publish_to", "probe"):
            continue
        fields = value.items() if isinstance(value, dict) else [(part, value)]
        for name, inner in fields:
            default = theirs[part][name] if isinstance(value, dict) else theirs[part]
            if _said(given, part, name, changed=inner != default):
                words += _option(part, name, inner)
    return shlex.join(words)


def _said(given: StudySpec, part: str, name: str, *, changed: bool) -> bool:
    if (part, name) in RENAMED and name in ("id", "source"):
        return True
    if (part, name) == ("model", "revision"):  # of the built-in model and of folders it is a hash of their files
        return changed and not given.model.id.startswith(("builtin:", "local:"))
    return changed or (part, name) in ALWAYS


def _option(part: str, name: str, value: Any) -> list[str]:
    option = "--" + RENAMED.get((part, name), name.replace("_", "-"))
    if isinstance(value, bool):
        return [option] if value else []
    if (part, name) == ("capture", "site_modules"):
        return [word for item in value for word in (option, str(item))]
    return [] if value is None else [option, ",".join(map(_text, value)) if isinstance(value, list) else _text(value)]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def days(provenance: Mapping[str, Any]) -> str:
    """The days (UTC) on which the model was run, `2026-03-01` or `2026-03-01 to 2026-03-04`; empty where not recorded."""
    runs = provenance.get("extraction")
    found = [run.get("date") for run in runs[:MAX_DAYS] if isinstance(run, Mapping)] if isinstance(runs, list) else []
    known = sorted({day for day in found if isinstance(day, str) and _DAY.fullmatch(day)})
    return known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}" if known else ""


UNITS = (
    "Activations have no unit. Layers, features, sequences and positions count from 0. A share is of all tokens, or "
    "of all layers "
    "that were read. Bytes: 1 GB is 10^9 bytes. Times are seconds."
)

_CITED = {
    "dettmers2022": (
        "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        "Tim Dettmers and Mike Lewis and Younes Belkada and Luke Zettlemoyer",
        "2022",
        "2208.07339",
    ),
    "sun2024": (
        "Massive Activations in Large Language Models",
        "Mingjie Sun and Xinlei Chen and J. Zico Kolter and Zhuang Liu",
        "2024",
        "2402.17762",
    ),
    "bondarenko2023": (
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
        "Yelysei Bondarenko and Markus Nagel and Tijmen Blankevoort",
        "2023",
        "2306.12929",
    ),
    "su2025": (
        "Unveiling Super Experts in Mixture-of-Experts Large Language Models",
        "Zunhai Su and Qingyuan Li and Hao Zhang and YuLei Qian and Yuchen Xie and Kehong Yuan",
        "2025",
        "2507.23279",
    ),
    "yu2024": ("The Super Weight in Large Language Models", "Yu and others", "2024", "2411.07191"),
}


def cited(summary: StudySummary, *, probed: bool) -> str:
    """BibTeX entries of the definitions that a page of this study uses. probed: whether it has a section about a probe."""
    wanted = ["dettmers2022", "bondarenko2023"]
    wanted += ["sun2024"] if summary.massive is not None else []
    wanted += ["su2025"] if summary.experts is not None else []
    wanted += ["yu2024"] if probed else []
    return "\n\n".join(_entry(name) for name in wanted)


def _entry(name: str) -> str:
    title, author, year, number = _CITED[name]
    fields = {"title": f"{{{title}}}", "author": author, "year": year, "eprint": number, "archivePrefix": "arXiv"}
    lines = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@misc{{{name},\n{lines}\n}}"
