"""`outliers runs show`: a finished study at the terminal, from its results folder or from where it is published.

Before it: `cli`, which parses. It reads summary.json and features.parquet, and counts nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.console import feature_table, line

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.workspace import Workspace

ROWS = 40
"""Rows of features.parquet that are shown; `--json` has them all."""
WIDE = 150
"""Columns of a terminal that has room for the ladder."""

_EXAMPLES = """examples:
  outliers runs show
  outliers runs show 3f2a91c05d6e7b84 --feature 247
  outliers runs show s3://atlas/runs/Qwen--Qwen3-30B-A3B/3f2a91c05d6e7b84 --feature 1461 --site mlp_in --json
"""


def add_runs_parsers(verbs: Any) -> None:
    """Add `runs show RUN`."""
    runs = verbs.add_parser("runs", help="read a finished study")
    actions = runs.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "print a study's answer, its lists, and the rows of features.parquet"
    show = actions.add_parser(
        "show",
        help=text,
        description=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="a study_id, a results folder, or the URL of a published study (default: the newest of the workspace)",
    )
    show.add_argument("--feature", type=int, metavar="N", help="this feature, layer by layer")
    show.add_argument("--site", metavar="SITE", help="rows of this site alone: attn_in, mlp_in, o_in, resid, block")
    show.add_argument("--layer", type=int, metavar="N", help="rows of this layer alone")
    show.add_argument("--workspace", metavar="DIR", help="default: $OUTLIERS_WORKSPACE, else ~/.outliers")
    show.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def show_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers runs show`. Raises BadInput where there is no such study, PublishRefused, AccessDenied, StoreUnavailable."""
    with tempfile.TemporaryDirectory() as place:
        folder = newest(workspace) if arguments.run is None else find_run(arguments.run, workspace, Path(place))
        summary = json.loads((folder / "summary.json").read_bytes())
        rows = read_rows(folder, summary, arguments)
    if arguments.json:
        print(json.dumps({"summary": summary, "features": rows}))
        return
    _show(console, summary, rows, arguments)


def newest(workspace: Workspace) -> Path:
    """The results folder of the study that was finished last. Raises BadInput where there is none."""
    from outliers.errors import BadInput

    done = sorted(workspace.results.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not done:
        raise BadInput(f"there is no finished study in {workspace.root}: run one with `outliers study`")
    return done[-1].parent


def find_run(name: str, workspace: Workspace, fetched: Path) -> Path:
    """The results folder of a study; a published one is fetched into `fetched`. Raises BadInput."""
    from outliers.errors import BadInput
    from outliers.publish import fetch

    if urlsplit(name).scheme in ("file", "s3"):
        place = name.rstrip("/").removesuffix("/manifest.json")
        parts = place.rsplit("/", 2)
        if len(parts) < 3 or not parts[0].rstrip("/").partition("://")[2]:
            raise BadInput(f"{name} is not TARGET/<model>/<study_id>, as `outliers study` prints it")
        fetch(parts[0], parts[1], parts[2], fetched)
        return fetched
    given = Path(name).expanduser()
    known = sorted(path.name for path in workspace.results.glob("*") if (path / "summary.json").exists())
    if name in known:
        return workspace.study(name)
    if (given / "summary.json").exists():
        return given
    raise BadInput(f"there is no study {name} in {workspace.root}; there is: {', '.join(known) or 'none'}")


def read_rows(folder: Path, summary: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The asked rows of features.parquet, the largest magnitude first; of one feature in the order of its layers."""
    from outliers.errors import BadInput
    from outliers.parquet import read_parquet
    from outliers.spec import BLOCK, SITES

    sites = [site for site in (*SITES, BLOCK) if site in summary["readings"]]
    if arguments.site is not None and arguments.site not in sites:
        raise BadInput(f"--site {arguments.site} was not captured; there is: {', '.join(sites)}")
    table = read_parquet((folder / "features.parquet").read_bytes())
    site = arguments.site or (None if arguments.feature is not None else summary["criteria"]["site"])
    asked = {"site": site, "feature": arguments.feature, "layer": arguments.layer}
    rows = [
        row for row in table.to_pylist() if all(value is None or row[name] == value for name, value in asked.items())
    ]
    if arguments.feature is not None:
        return sorted(rows, key=lambda row: (sites.index(row["site"]), row["layer"]))
    return sorted(rows, key=lambda row: (-(row["max_magnitude"] or 0.0), row["feature"], row["layer"]))


def _show(console: Console, summary: dict[str, Any], rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    model, corpus, rule = summary["model"], summary["corpus"], summary["criteria"]
    found = summary["systematic"]
    line(
        console,
        "study",
        f"{summary['study_id']} of {model['id']}, {model['num_layers']} layers x {model['hidden_size']:,}",
    )
    line(
        console,
        "corpus",
        f"{corpus['source']}: {corpus['num_tokens']:,} tokens in {corpus['num_sequences']:,} sequences",
    )
    console.print()
    console.print(
        f"[bold]{len(found)} systematic outlier feature{'' if len(found) == 1 else 's'}[/bold]{_range(summary)} by "
        f"{rule['reading']} at {rule['site']}, abs(x) >= {rule['magnitude']:g}",
        highlight=False,
        soft_wrap=True,
    )
    if arguments.feature is None and arguments.layer is None and found:
        console.print(feature_table(found))
    console.print()
    console.print(_row_table(rows[:ROWS], summary, console.width) if rows else _nothing(arguments))
    if len(rows) > ROWS:
        console.print(f"and {len(rows) - ROWS:,} more rows (--feature, --site, --layer choose; --json has all)")
    for text in summary["notes"]:
        line(console, "note", text, style="dim")


def _range(summary: dict[str, Any]) -> str:
    rule, drawn = summary["criteria"], summary.get("intervals")
    if drawn is None:
        return ""
    low, high = drawn["counts"][rule["site"]][rule["reading"]]
    return f" ({100 * drawn['level']:g}% interval over sequences: {low} to {high})"


def _nothing(arguments: argparse.Namespace) -> str:
    asked = [
        f"{name} {value}" for name in ("feature", "site", "layer") if (value := getattr(arguments, name)) is not None
    ]
    return f"features.parquet has no row with a hit{' for ' + ', '.join(asked) if asked else ''}"


def _row_table(rows: list[dict[str, Any]], summary: dict[str, Any], width: int) -> Any:
    from rich.table import Table

    # the ladder where there is room for it: cut numbers say nothing
    ladder = summary["criteria"]["ladder"] if width >= WIDE else []
    table = Table(box=None, header_style="bold", pad_edge=False, title="features.parquet", title_justify="left")
    table.add_column("site", no_wrap=True)
    names = ("layer", "feature", "hits", "first", "min", "max", "mean", "std", "kurtosis")
    for name in (*names, *(f">={step:g}" for step in ladder)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        moments = [row["mean"], row["std"], row["kurtosis"]]
        table.add_row(
            row["site"],
            *(str(row[name]) for name in ("layer", "feature")),
            *(f"{row[name]:,}" for name in ("hits", "first_token_hits")),
            *("" if value is None else f"{value:.4g}" for value in (row["min"], row["max"], *moments)),
            *(f"{count:,}" for count in row["ladder_hits"][: len(ladder)]),
        )
    return table
