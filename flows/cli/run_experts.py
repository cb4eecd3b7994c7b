"""`outliers runs show --expert LAYER.EXPERT`: what one expert of a mixture gets and gives, from experts.parquet.

And for `outliers plan`, how many tokens would reach every expert, by the routing that a study of the same model has seen.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.cli.console import line

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.results.schema import ExpertsBlock, StudySummary
    from outliers.workspace import Workspace

LOOKED_AT = 200
"""Studies of a workspace that are asked for the routing of a model, the newest first."""

_NAMED = re.compile(r"L?(\d{1,6})[.E](-?\d{1,6})", re.ASCII)


def chosen_expert(named: str, summary: Mapping[str, Any], rows: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """The row of an expert that is named as 1.68 or L1E68. Raises BadInput for an expert that the study does not have."""
    from outliers.errors import BadInput
    from outliers.units import format_ranges

    block = summary.get("experts")
    if block is None or rows is None:
        raise BadInput(
            f"the study {summary['study_id']} has no experts: its model is dense, or it was run with --experts off"
        )
    found = _NAMED.fullmatch(named)
    if found is None:
        raise BadInput(
            f"--expert {named[:40]!r} is not LAYER.EXPERT, such as 1.68 or L1E68; 1.-1 is the first shared one"
        )
    layer, expert = int(found[1]), int(found[2])
    for row in rows:
        if (row["layer"], row["expert"]) == (layer, expert):
            return row
    shared = f", and -1 to -{block['shared']} for the shared ones" if block["shared"] else ""
    raise BadInput(
        f"--expert {named} is not in that study; its layers with experts are {format_ranges(block['layers'])}, their "
        f"experts 0 to {block['experts'] - 1:,}{shared}"
    )


def show_expert(console: Console, summary: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """One expert, a line for each of its numbers; what is unknown is said."""
    from outliers.results.expert_words import name_of

    kind = "shared expert" if row["expert"] < 0 else "expert"
    line(console, kind, f"{name_of(row['layer'], row['expert'])} of {summary['model']['id']}")
    if not row["tokens"]:
        line(console, "tokens", f"none of {summary['corpus']['num_tokens']:,}: what it does is unknown")
        return
    tokens = f"{row['tokens']:,} of {summary['corpus']['num_tokens']:,}"
    names = (("first", "first_tokens"), ("delimiters", "delimiter_tokens"), ("special", "special_tokens"))
    line(console, "tokens", f"{tokens}; {', '.join(f'{name} {row[column]:,}' for name, column in names)}")
    if row["load"] is not None:
        ends = "" if row["load_low"] is None else f" ({row['load_low']:.4g} to {row['load_high']:.4g} over resamples)"
        line(console, "load", f"{row['load']:.4g} of the layer's mean{ends}")
    weights = row["weight_sum"]
    said = (
        "unknown: one is not finite"
        if weights is None
        else f"{weights:.6g} in all, {weights / row['tokens']:.4g} a token"
    )
    line(console, "weights", said)
    line(console, "down_in", _largest(row, "down_in", "column"))
    hits = "unknown" if row["hits"] is None else f"{row['hits']:,}"
    line(console, "hits", f"{hits} values of down_in with abs(x) >= {summary['criteria']['magnitude']:g}")
    line(console, "output", _largest(row, "output", "channel"))
    for name, column in (("super expert", "super_expert"), ("as published", "super_expert_as_published")):
        line(console, name, {None: "not judged", True: "yes", False: "no"}[row[column]])


def _largest(row: Mapping[str, Any], name: str, place: str) -> str:
    if row[f"{name}_max"] is None:
        return "unknown"
    where = f"{place} {row[f'{name}_{place}']}, sequence {row[f'{name}_sequence']}, position {row[f'{name}_position']}"
    return f"largest abs(x) {row[f'{name}_max']:.6g} at {where}"


def show_reach(console: Console, workspace: Workspace, model: str) -> None:
    """How many tokens would reach every expert, from the newest study of this model in the workspace; nothing without one."""
    from outliers.results.expert_words import reach_words

    found = _routed(workspace, model)
    if found is None:
        return
    study, experts = found
    said, tokens = reach_words(experts), study.corpus.num_tokens
    seen = f"by the routing of {tokens:,} tokens in study {study.study_id}, a lower bound in practice"
    line(console, "coverage", f"{'; '.join(said)} ({seen})")


def _routed(workspace: Workspace, model: str) -> tuple[StudySummary, ExpertsBlock] | None:
    """The newest finished study of a model that read its experts, and their part; damaged studies are passed over."""
    from outliers.errors import OutliersError
    from outliers.publish.contents import NotAllowedError, check_summary
    from outliers.publish.finished import read_finished

    places = []
    for path in workspace.results.glob("*/manifest.json"):
        with contextlib.suppress(OSError):  # removed meanwhile
            places.append((path.lstat().st_mtime, path.parent))
    for _, folder in sorted(places, reverse=True)[:LOOKED_AT]:
        try:
            found = read_finished(folder)
            if found is None or found.summary["model"]["id"] != model or found.summary.get("experts") is None:
                continue
            checked = check_summary(found.files["summary.json"])
        except (OutliersError, NotAllowedError, OSError):
            continue
        if checked.experts is not None:
            return checked, checked.experts
    return None
