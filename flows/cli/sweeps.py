"""`outliers sweep`: many studies from one file, and what they would take.

It runs the flow of the deployment `sweep`, with each study as a process of its own, and shows a line when one starts or
ends. A sweep that is there already is answered without Prefect.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from flows.cli.console import busy, line, size
from outliers.errors import JobFailed, OutliersError
from outliers.sweep.outcome import Ended, end_of, sentence, short, summary
from outliers.sweep.sweep import Sweep, SweepStudy, answer, read_sweep
from outliers.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outliers.sweep.plan import StudyPlan, SweepPlan

DONE, FAILED, REFUSED = 0, 1, 2

_TEXT = """Run the studies of a SWEEP.toml, one process each: models, dtypes, corpora, criteria.

  parallel = 2                  # how many at once (default: 1)
  stagger_seconds = 15          # between the starts of two models of the hub

  [defaults]                    # any part of a study, for all of them
  corpus = {source = "builtin:python-docs", num_sequences = 8}

  [matrix]                      # every combination is a study of every entry
  dtype = ["float32", "bfloat16"]
  num_sequences = [8, 32]       # the first 8 sequences of the corpus, and the first 32

  [[study]]                     # one for each model; what it says wins over defaults and matrix
  name = "olmoe"                # default: the model's own
  model = "allenai/OLMoE-1B-7B-0125"
  compute = {provider = "sky", gpu_count = 1, min_vram = 24}

A study reads a corpus from its first sequence: ranges of sequences are num_sequences in the matrix, each within the next;
other texts are another seed. compute = {shards = 4} spreads one study over machines, a range of sequences each.

One failure does not stop the others. The same command again does only what is missing.
Ready-made files are in sweeps/.
"""


def add_sweep_parser(verbs: Any, text: str) -> None:
    """Add `sweep SWEEP.toml`."""
    sub = verbs.add_parser(
        "sweep",
        help=text,
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.add_argument("file", type=Path, metavar="SWEEP.toml", help="the file with the studies")
    sub.add_argument(
        "--dry-run", action="store_true", help="print plan, price and time of every study; nothing is run or spent"
    )
    sub.add_argument("--parallel", metavar="N", help="how many studies run at once, 1 to 64 (default: the file's)")
    sub.add_argument("--publish-to", metavar="URL", help="artifact store of every study (default: the file's)")
    sub.add_argument(
        "--workspace", metavar="DIR", help="default: the file's, else $OUTLIERS_WORKSPACE, else ~/.outliers"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def sweep_command(arguments: argparse.Namespace, console: Console) -> int:
    """`outliers sweep`; the exit code. Raises BadInput for a file that can't be understood."""
    changes: dict[str, Any] = {"publish_to": arguments.publish_to} if arguments.publish_to else {}
    if arguments.workspace:
        changes["compute"] = {"workspace": str(Path(arguments.workspace).expanduser().absolute())}
    settings = {"parallel": arguments.parallel} if arguments.parallel is not None else {}
    sweep = read_sweep(arguments.file, changes, settings)
    if arguments.dry_run:
        return _dry_run(sweep, console, as_json=arguments.json)
    with busy(console, f"looking for what is there already of {len(sweep.studies)} studies"):
        there = all_there(sweep, _counted(console, sweep, "looking for"))
    ended = there or _run(sweep, arguments, console)
    if arguments.json:
        failed = [end.name for end in ended if end.state != "done"]
        studies = [end.model_dump() for end in ended]
        print(json.dumps({"sweep": sweep.name, "failed": failed, "studies": studies}))
    else:
        out = Answers()
        out.table(outcome_table(ended))
        out.print()
        wide = max(len(end.name) for end in ended)
        for end in ended:
            style = "" if end.state == "done" else "red"
            line(out, end.name.ljust(wide), short(end.reason) or end.published or end.report or "", style=style)
        bad = [end.name for end in ended if end.state != "done"]
        for end in ended:
            if end.name in bad and end.run:
                line(out, "log", f"{end.name}: {end.run}")
        if bad and sweep.remedy:
            line(out, "first", sweep.remedy)
        _say(out, f"{len(bad)} of {len(ended)} studies failed: {', '.join(bad)}" if bad else summary(ended))
    return DONE if all(end.state == "done" for end in ended) else FAILED


def all_there(sweep: Sweep, tell: Callable[[SweepStudy], None] = lambda study: None) -> tuple[Ended, ...] | None:
    """How the studies ended, where all of them are there already; else None. `tell`: called before each is looked up."""
    ended = []
    for study in sweep.studies:
        tell(study)
        try:
            outcome = answer(study)
        except OutliersError:
            return None  # the run reports this study's error, and does the others
        if outcome is None:
            return None
        ended.append(end_of(study, outcome))
    return tuple(ended)


def _run(sweep: Sweep, arguments: argparse.Namespace, console: Console) -> tuple[Ended, ...]:
    """Run the flow in this process, which starts a Prefect server where none is configured."""
    from flows.cli import interrupt
    from flows.cli.inprocess import STARTING, settle_prefect
    from flows.server.reach import check_server, check_settings
    from outliers.workspace import open_workspace

    server = settle_prefect(open_workspace(sweep.studies[0].spec.compute.workspace).root)
    _say(console, f"  {len(sweep.studies)} studies, {sweep.parallel} at once; {STARTING}")
    # the studies end first, and give their machines back
    interrupt.allow(interrupt.REMOTE_SECONDS)
    (check_server if server is None else check_settings)()
    from flows.observers import observed, on_sweep
    from flows.sweep import sweep as flow

    if server is not None:
        server.wait()

    ended: dict[str, Ended] = {}

    def watch(study: SweepStudy, end: Ended | None) -> None:
        if end is not None:
            ended[study.name] = end
        _say(console, f"  {sentence(study, end)}")

    # as for Ctrl-C: Prefect's own handler would end this process at once, and leave the server that it started
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with observed(on_sweep, watch):
        state: Any = flow(
            file=str(arguments.file.absolute()),
            parallel=sweep.parallel,
            publish_to=arguments.publish_to,
            workspace=arguments.workspace,
            children="process",
            return_state=True,
        )
    if len(ended) < len(sweep.studies):
        raise JobFailed(f"the sweep itself ended early: {state.message}; the same command goes on")
    return tuple(ended[study.name] for study in sweep.studies)


def outcome_table(ended: tuple[Ended, ...]) -> Table:
    """A row for each study: how it ended, what it found, how long it took."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("study", "state", "features", "time"):
        table.add_column(name, justify="right" if name in ("features", "time") else "left", overflow="fold")
    for end in ended:
        table.add_row(
            Text(end.name),
            Text(end.word, style="" if end.state == "done" else "red"),
            "" if end.features is None else str(end.features),
            format_seconds(end.seconds) if end.seconds else "",
        )
    return table


def _dry_run(sweep: Sweep, console: Console, *, as_json: bool) -> int:
    from outliers.sweep.plan import plan_sweep

    with busy(console, f"planning {len(sweep.studies)} studies"):
        plan = plan_sweep(sweep, tell=_counted(console, sweep, "planning"))
    if as_json:
        print(plan.model_dump_json())
    else:
        show_plan(Answers(), plan)
        show_refusals(console, plan)
    return REFUSED if plan.refusals or any(study.refused for study in plan.studies) else DONE


def show_plan(console: Answers, plan: SweepPlan) -> None:
    """A row for each study, then the sums."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("study", "machine", "time", "price", "download", "capture"):
        table.add_column(name, justify="left" if name in ("study", "machine") else "right", overflow="fold")
    for study in plan.studies:
        table.add_row(*map(Text, _cells(study)), style="red" if study.refused else "")
    console.table(table)
    console.print()
    if any(study.refused is None for study in plan.studies):
        _show_sums(console, plan)
    _say(console, "nothing was run; a study that is there already will cost nothing")


def show_refusals(console: Console, plan: SweepPlan) -> None:
    """What can't be run and why, on standard error as every refusal is."""
    for names, reason in refusals(plan):
        line(console, "refused", f"{names}: {reason}", style="red")
    if plan.remedy:
        line(console, "first", plan.remedy)
    for text in plan.refusals:
        line(console, "refused", text, style="red")


def refusals(plan: SweepPlan) -> list[tuple[str, str]]:
    """(names, reason) of the refused studies; reasons that differ in the model alone are joined."""
    groups: dict[str, list[StudyPlan]] = {}
    for study in plan.studies:
        if study.refused:
            groups.setdefault(study.refused.replace(study.model, "MODEL"), []).append(study)
    return [
        (", ".join(one.name for one in group), group[0].refused or "" if len(group) == 1 else text)
        for text, group in groups.items()
    ]


def _counted(console: Console, sweep: Sweep, doing: str) -> Callable[[SweepStudy], None]:
    """Prints which study is looked up, where there is no spinner: a model may take half a minute the first time."""
    numbers = itertools.count(1)

    def tell(study: SweepStudy) -> None:
        if not console.is_terminal:
            _say(console, f"  {doing} {study.name} ({next(numbers)} of {len(sweep.studies)})")

    return tell


def _show_sums(console: Console, plan: SweepPlan) -> None:
    more = "more than" if any(study.left_out for study in plan.studies) else "about"
    at_once = f", {format_seconds(plan.wall_seconds)} with {plan.parallel} at once" if plan.parallel > 1 else ""
    line(console, "time", f"{more} {format_seconds(plan.seconds)} one after the other{at_once}")
    unknown = f", not counting {', '.join(plan.unpriced)}" if plan.unpriced else ""
    line(console, "price", f"${plan.price:.2f} in all{unknown}")
    line(console, "download", size(plan.download_bytes))
    line(console, "captures", size(plan.capture_bytes))


def _cells(study: StudyPlan) -> tuple[str, ...]:
    plan = study.plan
    if study.refused or plan is None:
        return (study.name, "none", "", "", "", "")
    more = "> " if study.left_out else ""
    price = "not known" if study.price is None else f"${study.price:.2f}"
    lasts = f"{more}{format_seconds(study.seconds or 0.0)}"
    return (study.name, study.machine or "", lasts, price, size(plan.download_bytes), size(plan.capture_bytes_left))


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
