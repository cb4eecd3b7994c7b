"""`outliers runs show`: one finished study at the terminal, and where it is read from.

It reads summary.json and features.parquet, and counts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from flows.cli.answers import Answers
from flows.cli.console import feature_table, line
from flows.cli.run_experts import chosen_expert, show_expert
from flows.cli.run_words import own_verdict, verdict_here, verdict_words

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.publish.finished import Finished
    from outliers.publish.shelf import Published
    from outliers.results.schema import StudySummary
    from outliers.workspace import Workspace

ROWS = 40
"""Rows of features.parquet that are shown; `--json` has them all."""
MAX_SAID = 300
"""Most characters of a label or a dtype that are shown: a manifest is untrusted."""


def show_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers runs show`. Raises BadInput where there is no such study, PublishRefused, AccessDenied, StoreUnavailable."""
    found = read_run(arguments.run, workspace)
    rows = chosen_rows(found.table, found.summary, arguments)
    expert = getattr(arguments, "expert", None)
    chosen = None if expert is None else chosen_expert(expert, found.summary, found.experts)
    if arguments.json:
        more = {} if found.formats is None else {"quantization": found.formats.to_pylist()}
        more |= {} if found.experts is None else {"experts": found.experts if chosen is None else [chosen]}
        print(
            json.dumps(
                {"summary": found.summary, "label": found.label, "verdict": found.verdict, "features": rows} | more
            )
        )
        return
    out = Answers(arguments)
    if chosen is not None:
        show_expert(out, found.summary, chosen)
    elif getattr(arguments, "formats", False):
        _show_formats(out, found, arguments)
    else:
        _show(out, found, rows, arguments)


class Run(NamedTuple):
    """A finished study: the content of summary.json, the table features.parquet, its label, and the table quantization.parquet,
    None where no format was measured."""

    summary: dict[str, Any]
    table: Any
    label: str | None
    formats: Any = None
    verdict: str | None = None
    """What can be quantized, in words; None where no probe was made."""
    experts: list[dict[str, Any]] | None = None
    """The rows of experts.parquet; None where no experts were read."""
    names: tuple[str, str] = ("", "")
    """What model and corpus are called: here by their own names, at a URL as they are published."""


def read_run(name: str | None, workspace: Workspace) -> Run:
    """A study from wherever it is; of no name, the newest of the workspace.

    Of a published study the manifest and its tables are read and no other file. Raises BadInput, PublishRefused.
    """
    import pyarrow as pa

    from outliers.errors import BadInput
    from outliers.files.parquet import read_parquet
    from outliers.publish.allowlist import EXPERTS, FEATURES, QUANTIZATION, SUMMARY
    from outliers.publish.contents import (
        NotAllowedError,
        check_experts,
        check_features,
        check_quantization,
        check_summary,
    )
    from outliers.publish.own import names_here, public_names
    from outliers.publish.shelf import read_study

    url = None if name is None else published_url(name, workspace)
    if url is not None:
        study = read_study(url, (SUMMARY, FEATURES))
        place, files, manifest = url, dict(study.files), study.manifest
    else:
        folder = newest(workspace) if name is None else find_run(name, workspace)
        found = finished(folder)
        place, files, manifest = str(folder), found.files, found.manifest
    name = SUMMARY
    try:
        # others can write to a store, and a folder may come from anywhere
        summary = check_summary(files[SUMMARY])
        name = FEATURES
        check_features(files[FEATURES], summary)
        name = QUANTIZATION
        if url is not None and summary.quantization is not None:
            files |= read_study(url, (QUANTIZATION,)).files
        errors = files.get(QUANTIZATION)
        check_quantization(errors, summary)
        formats = None if errors is None else read_parquet(errors)
        names = names_here(workspace, manifest) if url is None else public_names(manifest)
        said = (
            verdict_here(folder, summary.study_id, names)
            if url is None
            else verdict_words(study.verdicts, summary.study_id)
        )
        name = EXPERTS
        if url is not None and summary.experts is not None:
            files |= read_study(url, (EXPERTS,)).files
        check_experts(files.get(EXPERTS), summary)
        rows = read_parquet(files[EXPERTS]).to_pylist() if EXPERTS in files else None
        label = label_of(manifest)
        return Run(json.loads(files[SUMMARY]), read_parquet(files[FEATURES]), label, formats, said, rows, names)
    except NotAllowedError as error:
        raise BadInput(
            f"{place} is not a study that this program reads: {name} {error}. A newer one may have written it: update "
            "outlier-features; else remove it and run the study again"
        ) from error
    except (ValueError, OSError, pa.ArrowException) as error:
        raise BadInput(f"{place} is damaged: {error}; remove the folder and run the study again") from error


def study_with_summary(name: str | None, workspace: Workspace) -> Published:
    """A study with its summary.json and verdicts, from wherever it is; of no name, the newest of the workspace.

    Raises BadInput, PublishRefused.
    """
    from outliers.publish.allowlist import SUMMARY
    from outliers.publish.shelf import Published, read_study

    url = None if name is None else published_url(name, workspace)
    if url is not None:
        return read_study(url)
    found = finished(newest(workspace) if name is None else find_run(name, workspace))
    return Published(str(found.folder), found.manifest, {SUMMARY: found.files[SUMMARY]}, own_verdict(found.folder))


def published_url(name: str, workspace: Workspace) -> str | None:
    """The URL of a published study that is given as one, or as its folder; None for a study of the workspace or its folder."""
    from flows.cli.atlas import store_url
    from outliers.spec import STORE_SCHEMES

    if urlsplit(name).scheme in STORE_SCHEMES:
        return name
    given = Path(name).expanduser()
    own = workspace.study(name) if "/" not in name else given
    if _is_results(own) or _is_results(given) or not given.is_dir():
        return None
    return store_url(name)


def _is_results(folder: Path) -> bool:
    """Whether a folder is a study's results, damaged or not: a published one's files lie a folder deeper."""
    return any((folder / name).exists() for name in ("summary.json", "features.parquet", "report.html"))


def label_of(manifest: Mapping[str, Any]) -> str | None:
    """The label of a study from its manifest."""
    found = manifest.get("spec", {}).get("label")
    return found[:MAX_SAID] if isinstance(found, str) else None


def finished(folder: Path) -> Finished:
    """A results folder, checked. Raises BadInput where it is not a finished study's, or not what was written there."""
    from outliers.errors import BadInput, DamagedResults
    from outliers.publish.finished import REMEDY, read_finished

    try:
        found = read_finished(folder)
    except DamagedResults as error:
        raise BadInput(f"{error}; {REMEDY}") from error
    if found is None:
        raise BadInput(f"{folder} has no manifest.json: that study is not finished; run it again")
    return found


def newest(workspace: Workspace) -> Path:
    """The results folder of the study that was finished last. Raises BadInput where there is none."""
    from outliers.errors import BadInput

    done = []
    for path in workspace.results.glob("*/manifest.json"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and not path.parent.is_symlink():
                done.append((found.st_mtime, path))
    if not done:
        raise BadInput(f"there is no finished study in {workspace.root}: run one with `outliers study`")
    return max(done)[1].parent


def find_run(name: str, workspace: Workspace) -> Path:
    """The results folder of a study, by its id or as a folder. Raises BadInput."""
    from outliers.errors import BadInput
    from outliers.names import nearest

    given = Path(name).expanduser()
    known = sorted(path.name for path in workspace.results.glob("*") if _is_results(path))
    if name in known:
        return workspace.study(name)
    if _is_results(given):
        return given
    meant = nearest(name, known)
    raise BadInput(f"there is no study {name} in {workspace.root}{meant}; there is: {', '.join(known) or 'none'}")


def chosen_rows(table: Any, summary: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The asked rows of features.parquet, the largest magnitude first; of one feature in the order of its layers."""
    from outliers.errors import BadInput
    from outliers.spec import BLOCK, OWN_WIDTH_SITES, SITES

    sites = [site for site in (*SITES, BLOCK) if site in summary["readings"]]
    if arguments.site is not None and arguments.site not in sites:
        raise BadInput(f"--site {arguments.site} was not captured; there is: {', '.join(sites)}")
    _check_number("layer", arguments.layer, sorted({row["layer"] for row in summary["layers"]}))
    hidden = summary["model"]["hidden_size"]
    # such a site has a width of its own, which is not in summary.json
    wide = any(site in sites and arguments.site in (None, site) for site in OWN_WIDTH_SITES)
    _check_number("feature", arguments.feature, range(max(hidden, arguments.feature or 0) + 1 if wide else hidden))
    site = arguments.site or (None if arguments.feature is not None else summary["criteria"]["site"])
    asked = {"site": site, "feature": arguments.feature, "layer": arguments.layer}
    rows = [
        row for row in table.to_pylist() if all(value is None or row[name] == value for name, value in asked.items())
    ]
    if arguments.feature is not None:
        return sorted(rows, key=lambda row: (sites.index(row["site"]), row["layer"]))
    return sorted(rows, key=lambda row: (-(row["max_magnitude"] or 0.0), row["feature"], row["layer"]))


def _check_number(name: str, value: int | None, known: Sequence[int]) -> None:
    """BadInput for a feature or layer that the study does not have: `no row` would read as an answer."""
    from outliers.errors import BadInput

    if value is not None and value not in known:
        whole = len(known) > 0 and len(known) == known[-1] - known[0] + 1
        there = f"{known[0]} to {known[-1]:,}" if whole else ", ".join(map(str, known)) or "not listed"
        raise BadInput(f"--{name} {value} is not in that study; its {name}s are {there}")


def _show(console: Answers, run: Run, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    from rich.text import Text

    from outliers.results.answer import crowded, disagreement, perplexity_words, reading_counts
    from outliers.results.expert_words import expert_lines
    from outliers.results.schema import StudySummary
    from outliers.untrusted.visible import visible_values

    summary, checked = visible_values(run.summary), StudySummary.model_validate(run.summary)
    model, corpus, rule = summary["model"], summary["corpus"], summary["criteria"]
    found = summary["systematic"]
    line(
        console,
        "study",
        f"{summary['study_id']} of {run.names[0] or model['id']}, {model['num_layers']} layers x {model['hidden_size']:,}",
    )
    kind = (model["architecture"], model["dtype"], model.get("quantization"))
    line(console, "model", ", ".join(part for part in kind if part))
    if run.label is not None:
        line(console, "label", visible_values(run.label))
    line(
        console,
        "corpus",
        f"{run.names[1] or corpus['source']}: {corpus['num_tokens']:,} tokens in {corpus['num_sequences']:,} sequences",
    )
    console.print()
    others = disagreement(reading_counts(checked))
    count = f"{len(found)} systematic outlier feature{'' if len(found) == 1 else 's'}"
    rest = (
        f"{_range(checked)} by {rule['reading']} at {rule['site']}, abs(x) >= {rule['magnitude']:g}"
        f"{f'; {others}' if others else ''}"
    )
    console.print(Text.assemble((count, "bold"), rest), soft_wrap=True)
    if (crowd := crowded(checked)) is not None:
        console.print(Text(crowd), soft_wrap=True)
    if checked.perplexity is not None:
        line(console, "perplexity", perplexity_words(checked.perplexity).removeprefix("perplexity "))
    for text in expert_lines(checked.experts):
        line(console, "experts", text)
    if arguments.feature is None and arguments.layer is None and found:
        console.table(feature_table(found))
    if run.verdict is not None:
        console.print()
        console.prose(run.verdict)
    console.print()
    if rows:
        console.table(_row_table(rows[:ROWS], summary))
    else:
        console.print(_nothing(arguments))
    if len(rows) > ROWS:
        console.print(f"and {len(rows) - ROWS:,} more rows (--feature, --site, --layer choose; --json has all)")
    for text in summary["notes"]:
        line(console, "note", text, style="dim")


def _show_formats(console: Answers, run: Run, arguments: argparse.Namespace) -> None:
    from flows.cli.run_formats import format_table
    from outliers.errors import BadInput
    from outliers.results.format_lines import format_lines

    if run.formats is None:
        raise BadInput(
            f"the study {run.summary['study_id']} has no number formats: run it with --formats int8_token,nvfp4, "
            "which is a study of its own from the same capture"
        )
    lines = format_lines(run.formats.to_pylist(), arguments.site, arguments.layer)
    console.table(format_table(lines, run.summary["quantization"]))
    for text in run.summary["notes"]:
        line(console, "note", text, style="dim")


def _range(summary: StudySummary) -> str:
    from outliers.results.answer import range_words, resampled

    ends = resampled(summary)
    return "" if ends is None else f" ({range_words(*ends)})"


def _nothing(arguments: argparse.Namespace) -> str:
    asked = [
        f"{name} {value}" for name in ("feature", "site", "layer") if (value := getattr(arguments, name)) is not None
    ]
    return f"features.parquet has no row with a hit{' for ' + ', '.join(asked) if asked else ''}"


def _row_table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from outliers.untrusted.visible import visible_values

    ladder = summary["criteria"]["ladder"]
    table = Table(box=None, header_style="bold", pad_edge=False, title="features.parquet", title_justify="left")
    table.add_column("site", no_wrap=True)
    names = ("layer", "feature", "hits", "first", "min", "max", "mean", "std", "kurtosis", "max/sd")
    for name in (*names, *(f">={step:g}" for step in ladder)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        moments = [row["mean"], row["std"], row["kurtosis"], row.get("max_sd")]
        table.add_row(
            Text(visible_values(row["site"])),
            *(str(row[name]) for name in ("layer", "feature")),
            *(f"{row[name]:,}" for name in ("hits", "first_token_hits")),
            *("" if value is None else f"{value:.4g}" for value in (row["min"], row["max"], *moments)),
            *(f"{count:,}" for count in row["ladder_hits"][: len(ladder)]),
        )
    return table
