"""`outliers runs list|show|compare`: finished studies at the terminal, from their results folders or where they are published.

It reads manifests and summary.json, and counts nothing. `show` is in `run_show`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from flows.cli.console import line
from flows.cli.options import add_common_options, add_plain_option
from flows.cli.run_show import (
    MAX_SAID,
    ROWS,
    label_of,
    show_command,
    study_with_summary,
)

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.atlas.compare import Comparison
    from outliers.atlas.row import AtlasFeature, AtlasRow
    from outliers.publish.own import Names
    from outliers.publish.shelf import Published
    from outliers.workspace import Workspace

LOCAL = (
    "somebody's own folder or file, by the hash of its content: a name is published only with --model-name; --label NAME tells "
    "studies apart"
)
NONE = "–"
"""Where a study has no such number: it was not measured, or there is no feature."""

_EXAMPLES = """examples:
  outliers runs list s3://atlas/runs
  outliers runs show
  outliers runs show 3f2a91c05d6e7b84 --feature 247
  outliers runs show 3f2a91c05d6e7b84 --expert 1.68
  outliers runs show s3://atlas/runs/Qwen--Qwen3-30B-A3B/3f2a91c05d6e7b84 --feature 1461 --site mlp_in --json
  outliers runs compare 3f2a91c05d6e7b84 s3://atlas/runs/Qwen--Qwen3-30B-A3B/77d0c1a92e3b4f56
"""


def add_runs_parsers(verbs: Any, text: str) -> None:
    """Add `runs list [URL]`, `runs show [RUN]` and `runs compare RUN RUN...`."""
    runs = verbs.add_parser("runs", help=text)
    actions = runs.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_list_and_compare(actions)
    text = "print a study's answer, its lists, and the rows of features.parquet"
    show = actions.add_parser(
        "show",
        help=text,
        description=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    show.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="a study_id, a results folder, or a published study's URL or folder (default: the newest of the workspace)",
    )
    show.add_argument("--feature", type=int, metavar="N", help="this feature, layer by layer")
    show.add_argument("--site", metavar="SITE", help="rows of this site alone: attn_in, mlp_in, o_in, resid, block")
    show.add_argument("--layer", type=int, metavar="N", help="rows of this layer alone")
    show.add_argument(
        "--formats", action="store_true", help="the errors of number formats: over all layers, and in the worst one"
    )
    show.add_argument(
        "--expert", metavar="LAYER.EXPERT", help="this expert of a mixture, such as 1.68; 1.-1 is the first shared one"
    )
    add_common_options(show)
    add_plain_option(show)


def _add_list_and_compare(actions: Any) -> None:
    text = "list the studies that are published in one place, or finished in the workspace"
    listing = actions.add_parser("list", help=text, description=text, allow_abbrev=False)
    listing.add_argument(
        "url", metavar="URL", nargs="?", help="what --publish-to named, or a folder (default: the workspace's results)"
    )
    add_common_options(listing)
    add_plain_option(listing)
    text = "set two or more studies side by side, like with like, and say in what they differ"
    compare = actions.add_parser("compare", help=text, description=text, allow_abbrev=False)
    compare.add_argument(
        "run", metavar="RUN", nargs="+", help="a study_id, a results folder, or a published study's URL or folder"
    )
    compare.add_argument(
        "--strict", action="store_true", help="refuse studies of other criteria, corpus, arithmetic or layers"
    )
    add_common_options(compare)
    add_plain_option(compare)


def runs_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers runs`: the command of its action, and what that raises."""
    {"list": list_command, "show": show_command, "compare": compare_command}[arguments.action](
        workspace, arguments, console
    )


def list_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers runs list`: reads manifests alone. Raises BadInput where there is none, AccessDenied, StoreUnavailable."""
    from flows.cli.atlas import store_url, warn
    from outliers.publish.own import names_here, public_names
    from outliers.publish.shelf import read_folders, read_store

    shelf = (
        read_folders(workspace.results)
        if arguments.url is None
        else read_store(store_url(arguments.url), summaries=False)
    )
    studies, skipped = shelf.studies, shelf.skipped
    names = [
        names_here(workspace, item.manifest) if arguments.url is None else public_names(item.manifest)
        for item in studies
    ]
    if arguments.json:
        listed = [
            {"url": item.url, "study_id": item.manifest["study_id"], "capture_id": item.manifest["capture_id"]}
            | {
                "results_digest": item.manifest["results_digest"],
                "dtype": _dtype(item),
                "label": label_of(item.manifest),
            }
            | item.manifest["headline"]
            | {"model_name": called.model, "corpus_name": called.corpus}
            for item, called in zip(studies, names, strict=True)
        ]
        print(json.dumps({"studies": listed, "skipped": [{"url": item.url, "why": item.why} for item in skipped]}))
        return
    out = Answers(arguments)
    out.table(_list_table(studies, names))
    line(out, "studies", f"{len(studies):,} in {shelf.url}")
    if any(_nameless(item, called) for item, called in zip(studies, names, strict=True)):
        line(out, "local", LOCAL, style="dim")
    warn(console, skipped)


def _list_table(studies: tuple[Published, ...], names: Sequence[Names]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    labels = any(label_of(item.manifest) for item in studies)
    shapes = any(
        _nameless(item, called) for item, called in zip(studies, names, strict=True)
    )  # where the name says nothing, and there is room
    for name in (
        "model",
        "corpus",
        *["shape"] * shapes,
        "dtype",
        "features",
        "reading",
        "site",
        "tokens",
        "study",
        *["label"] * labels,
    ):
        justify: Any = "right" if name in ("features", "tokens") else "left"
        # an id that is broken can't be copied
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "study")
    for item, called in zip(studies, names, strict=True):
        head = item.manifest["headline"]
        table.add_row(
            Text(called.model),
            Text(called.corpus),
            *[f"{head['num_layers']} x {head['hidden_size']}"] * shapes,
            Text(_dtype(item) or ""),
            f"{head['num_systematic']:,}",
            Text(head["reading"]),
            Text(head["site"]),
            f"{head['num_tokens']:,}",
            Text(item.manifest["study_id"]),
            *[Text(label_of(item.manifest) or "")] * labels,
        )
    return table


def _nameless(item: Published, called: Names) -> bool:
    """Whether a study is of somebody's own files and has neither name nor label: nothing tells what its model is."""
    return called.model.startswith("local:") and not label_of(item.manifest)


def _dtype(item: Published) -> str | None:
    """The arithmetic of a study from its manifest; None where it has none."""
    model = item.manifest["spec"].get("model")
    found = model.get("dtype") if isinstance(model, dict) else None
    return found[:MAX_SAID] if isinstance(found, str) else None


def compare_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers runs compare`. Raises BadInput where a study is not there, or with --strict not alike; PublishRefused."""
    from outliers.atlas.compare import compare
    from outliers.errors import BadInput
    from outliers.publish.own import names_here, public_names

    studies = [study_with_summary(name, workspace) for name in arguments.run]
    names = [
        public_names(item.manifest) if "://" in item.url else names_here(workspace, item.manifest) for item in studies
    ]
    found = compare(studies)
    if arguments.strict and not found.alike:
        unlike = found.unlike()
        for row, called in zip(found.rows, names, strict=True):
            unlike = unlike.replace(row.corpus, called.corpus) if row.corpus.startswith("local:") else unlike
        raise BadInput(f"the studies are not alike: {unlike}; without --strict they are shown side by side")
    if arguments.json:
        print(json.dumps(found.as_json()))
        return
    show_comparison(Answers(arguments), found, names)


def show_comparison(console: Answers, found: Comparison, names: Sequence[Names] = ()) -> None:
    """Facts and numbers side by side, a column a study; ≠ marks what differs. names: of each study's model and corpus
    (default: their ids)."""
    from rich.table import Table
    from rich.text import Text

    def table(title: str, first: str, rows: list[tuple[str, list[str], str]]) -> None:
        # not the table's own title, which is broken where the table is narrow
        console.print(Text(title, style="italic"), soft_wrap=True)
        made = Table(box=None, header_style="bold", pad_edge=False)
        made.add_column(first, no_wrap=True)
        for index in range(len(found.rows)):
            made.add_column(str(index + 1), overflow="fold")
        for name, cells, style in rows:
            made.add_row(Text(name, style=style), *(Text(cell, style=style) for cell in cells))
        console.table(made)
        console.print()

    for index, row in enumerate(found.rows, 1):
        line(console, str(index), row.url)
    console.print()
    facts = [
        (name, _fact_cells(name, [value] * len(found.rows), names), "")
        for name, value in found.same.items()
        if value is not None
    ]
    facts += [(f"{name} ≠", _fact_cells(name, own, names), "bold") for name, own in found.differs.items()]
    table("facts", "", facts)
    table("answers", "", [(name, cells, "") for name, cells in _answers(found).items()])
    if found.counts is not None:
        counted = [
            (f"{reading} at {site}", [f"{value:,}" for value in values], "")
            for site, own in found.counts.counts.items()
            for reading, values in own.items()
        ]
        table(f"features at abs(x) >= {found.counts.magnitude:g}, counted alike", "reading", counted)
    if found.features:
        known = list(found.features.items())[:ROWS]
        table("the systematic features", "feature", [(str(number), _cells(own), "") for number, own in known])
        if len(found.features) > ROWS:
            console.print(f"and {len(found.features) - ROWS:,} more features (--json has all)")
    _show_unlike(console, found)


def _fact_cells(name: str, values: Sequence[Any], names: Sequence[Names]) -> list[str]:
    """A fact of each study in few words; of model and corpus their names."""
    from outliers.atlas.compare import format_fact

    if names and name in ("model", "corpus"):
        return [getattr(called, name) or format_fact(value) for called, value in zip(names, values, strict=True)]
    return [format_fact(value) for value in values]


def _show_unlike(console: Console, found: Comparison) -> None:
    if found.criteria:
        what = "the answers are not to be compared"
        what += "; those counted alike are" if found.counts is not None else ", and nothing was counted alike"
        line(console, "criteria", f"differ in {', '.join(found.criteria)}: {what}", style="yellow")
    if found.conditions:
        line(
            console,
            "conditions",
            f"differ in {', '.join(found.conditions)}: every number depends on them",
            style="yellow",
        )
    if len({row.num_tokens for row in found.rows}) > 1:
        line(
            console,
            "tokens",
            "differ in number: a hit anywhere affects a layer for pooled, union and affected, so that these only grow with it; "
            "per_layer compares",
            style="yellow",
        )
    if found.alike:
        line(console, "alike", "the same criteria, corpus, arithmetic and layers")


def _answers(found: Comparison) -> dict[str, list[str]]:
    """The headline numbers, a list of texts each with one for each study."""

    def span(low: int | None, high: int | None) -> str:
        return "" if low is None or high is None else f" ({low:,} to {high:,})"

    def share(value: float | None, low: float | None, high: float | None) -> str:
        ends = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})"
        return NONE if value is None else f"{100 * value:.1f}{ends}"

    rows = found.rows
    return {
        "features": [f"{r.num_features:,}{span(r.num_features_low, r.num_features_high)}" for r in rows],
        "% layers": [share(r.layer_fraction, r.layer_fraction_low, r.layer_fraction_high) for r in rows],
        "% tokens": [share(r.position_fraction, r.position_fraction_low, r.position_fraction_high) for r in rows],
        "largest": [NONE if r.max_magnitude is None else f"{r.max_magnitude:g}" for r in rows],
        "massive": [NONE if r.massive_count is None else f"{r.massive_count:,}" for r in rows],
        "perplexity": [NONE if r.perplexity is None else f"{r.perplexity:.4g}" for r in rows],
        "legacy pairs": [NONE if r.legacy_pairs is None else f"{r.legacy_pairs:,}" for r in rows],
        **(_experts(rows) if any(r.experts_unreached is not None for r in rows) else {}),
        **(_verdicts(rows) if any(r.probe_id is not None for r in rows) else {}),
    }


def _experts(rows: Sequence[AtlasRow]) -> dict[str, list[str]]:
    """What is known of the experts of mixtures."""
    return {
        "super experts": [NONE if r.super_experts is None else f"{r.super_experts:,}" for r in rows],
        "expert output": [NONE if r.largest_expert_output is None else f"{r.largest_expert_output:.4g}" for r in rows],
        "% unreached": [NONE if r.experts_unreached is None else f"{100 * r.experts_unreached:.3g}" for r in rows],
    }


def _verdicts(rows: Sequence[AtlasRow]) -> dict[str, list[str]]:
    """What quantizing costs, of the studies that were probed."""

    def texts(values: Sequence[float | None]) -> list[str]:
        return [NONE if value is None else f"{value:.4g}" for value in values]

    return {
        "best format": [
            NONE if r.probe_id is None else f"{r.best_format or 'none'} (KL up to {r.budget:g})" for r in rows
        ],
        "KL int8_token": texts([r.int8_kl for r in rows]),
        "KL nvfp4": texts([r.nvfp4_kl for r in rows]),
        "perplexity without features": texts([r.perplexity_without_features for r in rows]),
    }


def _cells(own: Sequence[AtlasFeature | None]) -> list[str]:
    """One feature in each study: its magnitude and shares, – where it is not systematic."""
    found = []
    for row in own:
        if row is None:
            found.append(NONE)
            continue
        tokens = "" if row["position_fraction"] is None else f", {100 * row['position_fraction']:.1f}% tokens"
        found.append(f"{row['max_magnitude']:g}, {100 * row['layer_fraction']:.1f}% layers{tokens}")
    return found
