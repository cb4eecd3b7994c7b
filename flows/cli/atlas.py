"""`outliers atlas`: every study that is published in one place, as one page and one table.

It calls `outliers.atlas.table`, and shows what was made, and what was left out and why.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.arguments import number
from flows.cli.answers import Answers
from flows.cli.console import line

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.atlas.row import AtlasRow
    from outliers.atlas.table import Atlas, Filter
    from outliers.publish.shelf import Skipped

SHOWN = 20
"""Skipped things that are named at the terminal; `--json` has all."""

LEGACY = "legacy"
"""A reading that every study with a block has, and that never decides."""

_EXAMPLES = """examples:
  outliers atlas s3://atlas/runs
  outliers atlas s3://atlas/runs --out moe.html --parquet moe.parquet --reading pooled --dtype bfloat16
  outliers atlas demo/atlas --magnitude 6 --site block,attn_in
"""


def add_atlas_parser(verbs: Any, text: str) -> None:
    """Add `atlas URL`."""
    sub = verbs.add_parser(
        "atlas",
        help=text,
        description=f"{text}. Studies are grouped by identical criteria; options leave out others. A value of an option may be "
        "several, with commas.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.add_argument(
        "url",
        metavar="URL",
        help="what --publish-to named: s3://bucket/prefix, hf://datasets/ORG/NAME or file:///folder; or a folder",
    )
    sub.add_argument("--out", metavar="FILE.html", default="atlas.html", help="the page (default: atlas.html)")
    sub.add_argument("--parquet", metavar="FILE.parquet", help="the table, a row a study (default: none)")
    sub.add_argument(
        "--links",
        metavar="URL",
        help="https:// address at which the store is served; rows link to their reports there (default: a file:// or hf:// "
        "store itself; a bucket has no links)",
    )
    magnitude = number(float, lambda value: 0 < value < math.inf, "a magnitude: a number above 0")
    share = number(float, lambda value: 0 <= value <= 1, "a share from 0 to 1, such as 0.25")
    count = number(int, lambda value: value >= 0, "a number of tokens, 0 or more")
    filters: list[tuple[str, Callable[[str], Any], str]] = [
        ("reading", str, "decided by this reading: pooled, union, per_layer, affected"),
        ("site", str, "decided at this site: block, attn_in, mlp_in, o_in, resid"),
        ("magnitude", magnitude, "a hit is abs(x) >= this"),
        ("layer-fraction", share, "at least this share of layers"),
        ("position-fraction", share, "at least this share of tokens"),
        ("dtype", str, "arithmetic of the model, such as bfloat16"),
        ("corpus", str, "source of the text, such as HuggingFaceFW/fineweb-edu"),
    ]
    for name, kind, meaning in filters:
        sub.add_argument(f"--{name}", type=_several(kind), default=(), metavar="X[,Y]", help=f"only studies: {meaning}")
    sub.add_argument("--min-tokens", type=count, default=0, metavar="N", help="only studies of at least N tokens")
    sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def split(text: str) -> tuple[Any, ...]:
        found = tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        if not found:  # it would ask nothing: all studies would be there, without a word
            raise argparse.ArgumentTypeError(f"'{text}' names nothing: give one value, or several with commas")
        return found

    return split


def atlas_command(arguments: argparse.Namespace, console: Console) -> None:
    """`outliers atlas`. Raises BadInput where there is no study or none passes, TargetError, AccessDenied, StoreUnavailable."""
    from outliers.atlas.links import check_base
    from outliers.atlas.page import write_atlas_page
    from outliers.atlas.table import read_atlas, write_atlas_table
    from outliers.errors import BadInput

    page = _target_file(arguments.out)
    links = None if arguments.links is None else check_base(arguments.links)
    table = None if arguments.parquet is None else _target_file(arguments.parquet)
    atlas = read_atlas(store_url(arguments.url), _filter(arguments))
    try:
        write_atlas_page(page, atlas, links)
        if table is not None:
            write_atlas_table(table, atlas.rows)
    except OSError as error:
        raise BadInput(f"{error.filename or page} can't be written: {error.strerror or error}") from error
    if arguments.json:
        print(json.dumps(_as_json(atlas, page, table)))
        return
    _show(Answers(), atlas, page, table)
    warn(console, atlas.skipped)


def store_url(given: str) -> str:
    """The URL of an artifact store; a folder of this machine may be given as such."""
    if "://" in given:
        return given
    return f"file://{Path(given).expanduser().absolute()}"


def warn(console: Console, skipped: tuple[Skipped, ...]) -> None:
    """Print what in a store can't be read as a study."""
    for item in skipped[:SHOWN]:
        line(console, "skipped", item.why, style="yellow")
    if len(skipped) > SHOWN:
        line(console, "skipped", f"and {len(skipped) - SHOWN:,} more (--json names them all)", style="yellow")


def _target_file(name: str) -> Path:
    from outliers.errors import BadInput

    path = Path(name).expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else f"can't be written: there is no folder {path.parent}"
        raise BadInput(f"{path} {why}; give another file")
    return path


def _filter(arguments: argparse.Namespace) -> Filter:
    from outliers.atlas.table import Filter
    from outliers.errors import BadInput
    from outliers.spec import BLOCK, READINGS, SITES

    for name, given, known in (
        ("reading", arguments.reading, READINGS),
        ("site", arguments.site, (BLOCK, *SITES)),
    ):
        if name == "reading" and LEGACY in given:
            raise BadInput(
                f"--reading {LEGACY} never decides, so no study is of it: it is counted at block with the reading that does, "
                f"and the page compares it with the earlier pipeline; those that decide: {', '.join(known)}"
            )
        strange = [value for value in given if value not in known]
        if strange:
            raise BadInput(f"--{name} {strange[0]} is not known; there is: {', '.join(known)}")
    return Filter(
        readings=arguments.reading,
        sites=arguments.site,
        magnitudes=arguments.magnitude,
        layer_fractions=arguments.layer_fraction,
        position_fractions=arguments.position_fraction,
        dtypes=arguments.dtype,
        corpora=arguments.corpus,
        min_tokens=arguments.min_tokens,
    )


def _grouped(atlas: Atlas) -> list[tuple[AtlasRow, ...]]:
    from outliers.atlas.table import groups

    return groups(atlas.rows)


def _as_json(atlas: Atlas, page: Path, table: Path | None) -> dict[str, Any]:
    names = ("reading", "site", "magnitude", "min_layer_fraction", "min_position_fraction")
    return {
        "url": atlas.url,
        "studies": len(atlas.rows),
        "models": len({row.model for row in atlas.rows}),
        "groups": [
            {name: getattr(own[0], name) for name in names} | {"studies": [row.url for row in own]}
            for own in _grouped(atlas)
        ],
        "left_out": atlas.left_out,
        "skipped": [{"url": item.url, "why": item.why} for item in atlas.skipped],
        "page": str(page),
        "parquet": None if table is None else str(table),
    }


def _show(console: Answers, atlas: Atlas, page: Path, table: Path | None) -> None:
    own = _grouped(atlas)
    models = len({row.model for row in atlas.rows})
    line(console, "studies", f"{len(atlas.rows):,} of {models:,} model{'s'[: models != 1]} in {atlas.url}")
    if len(own) > 1:
        line(
            console,
            "criteria",
            f"{len(own)} different sets: each has a section of its own, and is compared with itself alone",
        )
    for rows in own:
        head = rows[0]
        line(
            console,
            f"  {len(rows):,}",
            f"{head.reading} at {head.site}, abs(x) >= {head.magnitude:g}, {100 * head.min_layer_fraction:g}% of layers, "
            f"{100 * head.min_position_fraction:g}% of tokens",
        )
    if atlas.left_out:
        line(console, "left out", f"{atlas.left_out:,} by {atlas.filter.words()}")
    line(console, "page", str(page))
    if table is not None:
        line(console, "table", str(table))
