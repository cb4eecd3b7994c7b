"""`outliers models inspect`: what a model is made of, from its config alone.

Shows what `outliers.model.describe` finds. No weight is read or downloaded.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from flows.cli.console import count, size

if TYPE_CHECKING:
    from outliers.model.describe import ModelInfo

_TEXT = "show layers, sites, router, experts and parameters of a model, from its config alone"


def add_models_parser(verbs: Any, text: str) -> None:
    """Add `models inspect MODEL` with the options that change what is shown."""
    models = verbs.add_parser("models", help=text)
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    sub = actions.add_parser("inspect", help=_TEXT, description=_TEXT, allow_abbrev=False)
    sub.add_argument(
        "model", metavar="MODEL", help="a hub id, a folder (a config.json is enough), a .gguf file, or builtin:smollm2"
    )
    sub.add_argument("--revision", help="branch, tag or commit on the hub (default: main)")
    sub.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto (default: auto)")
    sub.add_argument("--quantization", default="auto", help="auto, checkpoint or none (default: auto)")
    sub.add_argument(
        "--site-module",
        action="append",
        default=[],
        metavar="SITE=PATTERN",
        help="name a site of an unknown family (may be given again)",
    )
    sub.add_argument("--workspace", metavar="DIR", help="default: $OUTLIERS_WORKSPACE, else ~/.outliers")
    sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def inspect_model(arguments: argparse.Namespace) -> ModelInfo:
    """The ModelInfo that was asked for. Raises BadInput and its kinds."""
    from outliers.model.describe import describe_model
    from outliers.model.source import find_model
    from outliers.study.prepare import parse_spec
    from outliers.workspace import open_workspace

    content = {
        "model": {
            "id": arguments.model,
            "revision": arguments.revision,
            "dtype": arguments.dtype,
            "quantization": arguments.quantization,
        },
        "capture": {"site_modules": arguments.site_module},
    }
    spec, workspace = parse_spec(content, "models inspect"), open_workspace(arguments.workspace)
    return describe_model(
        find_model(spec.model, workspace, weights=False),
        spec.model.dtype,
        workspace,
        quantization=spec.model.quantization,
        named=spec.capture.site_modules,
    )


def _stored(info: ModelInfo) -> str:
    """In what the weights are once they are loaded, and in what they are on disk where that is another."""
    if info.quantization or info.stored_quantization is None:
        return info.quantization or info.dtype
    return f"{info.dtype}; {size(info.weights.checkpoint_bytes)} on disk in {info.stored_quantization}, made plain on loading"


def show_model(console: Answers, info: ModelInfo) -> None:
    """Print an inspection as lines of name and value, then a table of the sites."""
    from rich.table import Table

    from outliers.spec import SITES
    from outliers.units import format_ranges

    anatomy = info.anatomy
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    active = "" if info.num_experts is None else f", {count(info.active_parameters)} active a token"
    rows = [
        ("model", f"{info.source.name} ({info.architecture})"),
        ("revision", info.source.revision[:12]),
        ("parameters", f"{count(info.total_parameters)}{active}"),
        ("weights", f"{size(info.weight_bytes)} in memory ({_stored(info)})"),
        (
            "arithmetic",
            f"{info.dtype}; attention {info.attention_implementation}"
            + (f"; experts {info.experts_implementation}" if info.experts_implementation else ""),
        ),
        ("layers", f"{info.num_layers} of {info.hidden_size:,} features: {anatomy.backbone}.{anatomy.layers}"),
        ("positions", f"{info.max_positions:,}" if info.max_positions else "no limit in the config"),
    ]
    if anatomy.moe_layers:
        dense = [layer for layer in range(info.num_layers) if layer not in anatomy.moe_layers]
        routed = f"{info.num_experts} experts, {info.experts_per_token} a token"
        rows += [
            ("MoE layers", f"{len(anatomy.moe_layers)} ({format_ranges(anatomy.moe_layers)}), {routed}"),
            ("dense layers", f"{len(dense)} ({format_ranges(dense)})" if dense else "none"),
            ("router", anatomy.router or ""),
            ("experts", anatomy.experts or ""),
        ]
    for name, text in rows:
        table.add_row(name, text)
    console.table(table)
    sites = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("site", "features", "module (* is the layer; :input is what it receives)"):
        sites.add_column(name, overflow="fold")
    for site in SITES:
        if site in anatomy.sites:
            other = anatomy.alias_of(site)
            same = f" (the same tensor as {other})" if other else ""
            there = anatomy.layers_of(site)
            same += f" (layers {format_ranges(there)})" if len(there) < info.num_layers else ""
            sites.add_row(site, str(anatomy.widths.get(site, "differ")), anatomy.pattern(site) + same)
        elif site == "down_in" and anatomy.moe_layers:
            sites.add_row(site, "", "in no layer: each has experts in the place of an MLP")
        else:
            sites.add_row(site, "", "not known: --site-module " + site + "=PATTERN")
    console.print()
    console.table(sites)
