"""`outliers probe` and `outliers advise`: what a change does to a model, and the verdict from it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from flows.arguments import number
from flows.cli.answers import Answers
from flows.cli.console import line

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.publish.probes import Probed
    from outliers.spec import StudySpec
    from outliers.workspace import Workspace

_EXAMPLES = """examples:
  outliers probe STUDY --check
  outliers probe STUDY --quantize int8_token,nvfp4,had64+nvfp4 --hold systematic --map int8_token
  outliers probe STUDY --zero systematic,matched,random=5 --probe-dtype float32
  outliers probe STUDY --probe-experts 1.68,2.92
  outliers probe STUDY --map int8_token --map-experts 1,2.92
  outliers advise STUDY --budget 0.1
"""
SHORT = {"within": "within", "beyond": "beyond", "unclear": "unclear", "indistinguishable": "no effect"}
"""Verdicts in one word, for the table; the paragraph below it has them in full."""
NO_PROBE = "it has no probe: make one with `outliers probe {} --check`"


def add_probe_parser(verbs: Any, text: str) -> None:
    """Add `probe`."""
    from flows.cli.options import add_common_options, add_part_options

    probe = verbs.add_parser(
        "probe",
        help=text,
        description=text,
        usage="outliers probe [STUDY] [options]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    probe.add_argument(
        "study",
        nargs="?",
        metavar="STUDY",
        help="its id, as `outliers runs list` shows it (default: the one finished last)",
    )
    probe.add_argument(
        "--check", dest="probe.probe", action="store_const", const="check", default=None, help="short for --probe check"
    )
    add_part_options(probe, ("probe", "compute"), leave_out=("workspace", "shards", "executor"))
    add_common_options(probe)


def add_advise_parser(verbs: Any, text: str) -> None:
    """Add `advise`."""
    from flows.cli.options import add_common_options, add_plain_option

    advise = verbs.add_parser(
        "advise",
        help=text,
        description=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    advise.add_argument(
        "study", nargs="?", metavar="STUDY", help="its id, or its results folder (default: the study finished last)"
    )
    advise.add_argument(
        "--budget",
        type=number(float, lambda value: 0 < value < float("inf"), "a positive KL in nats a token, such as 0.05"),
        metavar="KL",
        help="most KL divergence that is accepted, in nats a token (default: 0.05)",
    )
    add_common_options(advise)
    add_plain_option(advise)


def probe_spec(arguments: argparse.Namespace, workspace: Workspace) -> StudySpec:
    """The study as it was asked for, with the probe of the options. BadInput where it is not known, or nothing is asked."""
    from flows.cli.options import overlaid
    from flows.cli.run_show import find_run, newest
    from outliers.errors import BadInput
    from outliers.study.prepare import read_prepared

    name = arguments.study or newest(workspace).name
    places = (workspace.asked(name), workspace.root / "studies" / f"{name}.json")
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        find_run(name, workspace)
        raise BadInput(
            f"how the study {name} was asked for is not known here: run `outliers study` with its own options and "
            "--probe check; what is finished of it is not made again"
        )
    known = read_prepared(place, workspace).spec
    content = known.model_dump(mode="json") | {"probe": {}}
    content["compute"]["workspace"] = str(workspace.root)
    spec = overlaid(content, arguments, ("probe", "compute"))
    if not spec.probe.asked:
        raise BadInput(
            "nothing is asked: give --check, or --zero, --mean, --quantize, --map, --weight, --prefix or --probe-experts"
        )
    return spec


def advise_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers advise`. Raises BadInput where there is no such study, or no probe of it."""
    from flows.cli.run_show import find_run, newest
    from flows.cli.run_words import names_of
    from outliers.advice.advise import DEFAULT_BUDGET, advise
    from outliers.errors import BadInput, DamagedResults
    from outliers.publish.probes import newest_probe

    folder = newest(workspace) if arguments.study is None else find_run(arguments.study, workspace)
    try:
        found = newest_probe(folder)
    except DamagedResults as error:
        raise BadInput(str(error)) from error
    if found is None:
        raise BadInput(f"{folder.name}: {NO_PROBE.format(folder.name)}")
    # JSON has what is published; a person reads the names of this machine
    names = None if arguments.json else names_of(folder, workspace)
    advice = advise(found.probes, found.sensitivity, arguments.budget or DEFAULT_BUDGET, names)
    if arguments.json:
        print(json.dumps(advice.model_dump(mode="json")))
        return
    show_advice(Answers(arguments), found, advice)


def show_advice(console: Answers, found: Probed, advice: Any) -> None:
    """The table of formats, then the paragraph, then where the page is."""
    from rich.table import Table
    from rich.text import Text

    from outliers.untrusted.visible import visible

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("format", "verdict", "KL", "95%", "predicted", "perplexity", "best repair", "leave alone"):
        left = name in ("format", "verdict", "best repair")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "best repair", overflow="fold")
    for item in advice.formats:
        best = item.repairs[0] if item.repairs else None
        table.add_row(
            item.format + (f" + {item.weights} weights" if item.weights else ""),
            SHORT[item.verdict] if item.verdict else "not probed",
            _short(item.confirmed_kl),
            "" if item.confirmed_interval is None else "-".join(_short(end) for end in item.confirmed_interval),
            _short(item.predicted_kl),
            _short(item.perplexity),
            "" if best is None else f"{best.what}: {_short(best.kl)}",
            "no map" if item.leave_alone is None else str(len(item.leave_alone)),
        )
    console.table(table)
    console.print()
    console.prose(visible(advice.paragraph))
    for item in advice.not_tried:
        console.print(Text(visible(f"  {item}")), soft_wrap=True)
    console.print()
    line(console, "probe", str(found.folder / "probe.html"))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
