"""The command `outliers`: its verbs (`parser.COMMANDS` has them all), and how a study is refused, answered or run.

Bad input is refused, and a finished study answered, before Prefect is imported.
Exit codes: 0 done, 2 refused before anything ran, 1 failed, 3 done and not tracked, 130 ended by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.exit_codes import DONE, FAILED, NOT_TRACKED, REFUSED
from flows.cli.parser import build_parser
from flows.cli.quiet import quiet_libraries
from outliers.errors import BadInput, OutliersError, PlanRefused

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.publish.outcome import Outcome
    from outliers.publish.tracking import Tracked
    from outliers.spec import StudySpec
    from outliers.study.prepare import Prepared
    from outliers.workspace import Workspace


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    if importlib.util.find_spec("rich") is None or importlib.util.find_spec("prefect") is None:
        print("the command needs the control side: pip install 'outlier-features[flows]'", file=sys.stderr)
        return REFUSED
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        from flows.cli.completion import answer, asked_words

        answer(build_parser(asked_words()))
    arguments = build_parser(words).parse_args(words or ["--help"])
    from rich.console import Console
    from rich.text import Text

    from outliers.untrusted.visible import visible

    # names, labels and what machines and stores say are printed as text, never as markup
    console = Console(stderr=True, markup=False, emoji=False)
    from flows.cli import verbs as others

    verbs = {
        "study": study_command,
        "plan": plan_command,
        "models": others.models_command,
        "captures": others.captures_command,
        "verify": others.verify_command,
        "runs": others.runs_command,
        "report": others.report_command,
        "export": others.export_command,
        "atlas": others.atlas_command,
        "card": others.card_command,
        "merge": merge_command,
        "sweep": others.sweep_command,
        "machines": others.machines_command,
        "probe": probe_command,
        "advise": others.advise_command,
        "completion": others.completion_command,
    }
    from flows.cli import interrupt

    try:
        with interrupt.bounded():
            return verbs[arguments.verb](arguments, console, words)
    except BadInput as error:
        console.print(Text(visible(f"refused: {error}"), style="red"), soft_wrap=True)
        return REFUSED
    except OutliersError as error:
        console.print(Text(visible(f"failed: {error}"), style="red"), soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        if interrupt.reason():
            console.print(Text(f"failed: {interrupt.reason()}", style="red"), soft_wrap=True)
            return FAILED
        console.print(interrupt.SAID)
        return interrupt.INTERRUPTED


def study_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers study`."""
    from flows.cli.options import read_spec

    quiet_libraries()
    spec = read_spec(arguments)
    if arguments.print_spec:
        print(spec.model_dump_json(indent=1))
        return DONE
    return _run(spec, arguments, console, argv)


@contextlib.contextmanager
def nothing_ran() -> Iterator[None]:
    """Every error of the block is a refusal: keys that are missing, a hub or a store that does not answer, damaged results."""
    try:
        yield
    except BadInput:
        raise
    except OutliersError as error:
        raise BadInput(str(error)) from error


def _run(spec: StudySpec, arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """Answer a study that is finished, or check it and run it."""
    from flows.cli.console import busy, library_lines
    from outliers.publish.outcome import find_outcome
    from outliers.workspace import open_workspace

    uri = _tracking(arguments)
    workspace = open_workspace(spec.compute.workspace)
    _check_options(spec, workspace, console, argv)
    from flows.cli.machines import warn_of_overdue

    warn_of_overdue(workspace, console)
    with nothing_ran(), busy(console, "looking at the model, the corpus and the target"):
        prepared = _prepare(spec, workspace, console)
        with library_lines(console):
            outcome = find_outcome(prepared, workspace)
        if outcome is None:
            _check(prepared, workspace, console, argv)
    if outcome is None:
        from flows.cli.inprocess import run_flow

        outcome = run_flow(spec, workspace, console)
    tracked = None if uri is None else _track(outcome, uri, console)
    _finish(outcome, prepared, workspace, console, as_json=arguments.json, tracked=tracked)
    return DONE if tracked is None or tracked.url else NOT_TRACKED


def _tracking(arguments: argparse.Namespace) -> str | None:
    """The tracking server that is asked for. Raises BadInput, before anything ran."""
    if getattr(arguments, "track", None) is None:
        return None
    from outliers.publish.tracking import tracking_uri

    return tracking_uri(arguments.track)


def _track(outcome: Outcome, uri: str, console: Console) -> Tracked:
    """Log a finished study, and say where it is or why it is not there: the study is finished in either case."""
    from flows.cli.console import busy, line
    from outliers.publish.tracking import track

    with busy(console, "logging the study at the tracking server"):
        tracked = track(Path(outcome.results), uri, outcome.published)
    if tracked.url is None:
        line(console, "warning", f"the study is finished and not tracked: {tracked.why}", style="yellow")
        line(
            console, "", "the same command logs it, once the server answers; nothing is computed again", style="yellow"
        )
    return tracked


def _check_options(spec: StudySpec, workspace: Workspace, console: Console, argv: list[str]) -> None:
    """Refuse options of another provider before anything is done; where a rented machine is meant, with its command."""
    from outliers.machines.base import MachineRequest
    from outliers.machines.options import check_options
    from outliers.machines.providers import provider
    from outliers.spec import DEFAULT_PROVIDER, chosen

    try:
        check_options(spec.compute)
    except PlanRefused as error:
        if chosen(spec.compute.provider) != DEFAULT_PROVIDER or spec.compute.host:
            raise
        _show_rented(console, argv)
        _, lacking = provider(DEFAULT_PROVIDER, workspace.root).offers(MachineRequest.from_spec(spec.compute))
        raise PlanRefused("; ".join([str(error), *(f"{item.name}: {item.reason}" for item in lacking)])) from error


def _show_rented(console: Console, argv: list[str]) -> None:
    console.print("on a rented machine the command would be:", soft_wrap=True)
    command = shlex.join(["outliers", *argv, "--provider", "sky"])
    console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)


def _prepare(spec: StudySpec, workspace: Workspace, console: Console) -> Prepared:
    from flows.cli.console import library_lines
    from outliers.study.prepare import prepare

    with library_lines(console):
        return prepare(spec, workspace)


def _check(prepared: Prepared, workspace: Workspace, console: Console, argv: list[str]) -> None:
    """Refuse what can't work before anything heavy starts: the machine, the disk, the memory, the target."""
    from outliers.publish.outcome import find_finished
    from outliers.publish.probes import is_probed
    from outliers.publish.publish import check_target

    if prepared.spec.probe.asked:
        from outliers.probe.checks import check_before

        check_before(prepared)
    if find_finished(prepared, workspace) is None or not is_probed(prepared, workspace):
        _check_machine(prepared, workspace, console, argv)
    if prepared.spec.publish_to is not None:
        check_target(prepared.spec.publish_to)


def _check_machine(prepared: Prepared, workspace: Workspace, console: Console, argv: list[str]) -> None:
    from outliers.counting.shards import is_here
    from outliers.dispatch.transfer import check_transfer
    from outliers.machines.providers import provider
    from outliers.planning.remaining import check_rest
    from outliers.spec import DEFAULT_PROVIDER, chosen
    from outliers.study.parts import machine_name, split

    compute = prepared.spec.compute
    source = provider(compute.provider, workspace.root)
    check_transfer(prepared)
    missing = [shard for shard in split(prepared, compute.shards) if not is_here(shard, prepared, workspace)]
    names = {machine_name(prepared, shard) for shard in (missing if compute.shards > 1 else (None,))}
    try:
        # a machine that is held for this capture was chosen before
        if not names <= {rental.name for rental in source.list() if rental.state == "up"}:
            check_rest(prepared, workspace, source)
    except PlanRefused:
        asked = compute.gpu_count or compute.gpu_filter or compute.min_vram or compute.min_cpu_ram
        if asked and chosen(compute.provider) == DEFAULT_PROVIDER:
            _show_rented(console, argv)
        raise


def _finish(
    outcome: Outcome,
    prepared: Prepared,
    workspace: Workspace,
    console: Console,
    *,
    as_json: bool,
    tracked: Tracked | None = None,
) -> None:
    from flows.cli.answers import Answers
    from flows.cli.console import line, next_commands, show_outcome
    from outliers.files.atomic import held_bytes
    from outliers.study.parts import captures_of_shards

    own = (workspace, *(part for _, part in captures_of_shards(workspace, outcome.capture_id)))
    held = sum(held_bytes(place.capture(outcome.capture_id)) for place in own)
    if as_json:
        more = {} if tracked is None else {"tracked": tracked.url, "not_tracked": tracked.why}
        print(json.dumps(outcome.model_dump() | {"capture_bytes": held} | more))
        return
    criteria = prepared.spec.criteria
    answer = (
        f"by the reading {criteria.reading} at {prepared.site}: abs(x) >= {criteria.magnitude:g} in at least "
        f"{100 * criteria.layer_fraction:g}% of {len(prepared.layers)} layers and {100 * criteria.position_fraction:g}% of "
        f"{prepared.corpus.num_tokens:,} tokens"
    )
    show_outcome(Answers(), outcome, held, answer, next_commands(outcome, prepared.spec.compute.workspace))
    if tracked is not None and tracked.url is not None:
        line(Answers(), "tracked", tracked.url)
    _show_kept(prepared, workspace, console)


def _show_kept(prepared: Prepared, workspace: Workspace, console: Console) -> None:
    """Machines that stay are paid for: until when, and how to end them. A study that is spread has one for each part."""
    import time

    from flows.cli.console import line
    from outliers.machines.rentals import Rentals
    from outliers.study.parts import machine_name, split

    shards, now = prepared.spec.compute.shards, time.time()
    for shard in split(prepared, shards) if shards > 1 else (None,):
        name = machine_name(prepared, shard)
        known = Rentals(workspace.root).get(name)
        if known is None:
            continue
        until = time.strftime("%H:%M", time.localtime(known.lease_until))
        spent = f", ${known.spent(now):.2f} so far" if known.price_per_hour else ""
        line(
            console,
            "machine",
            f"{name} on {known.place} is kept until {until}{spent}: outliers machines release {name}",
        )


def plan_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers plan`."""
    from flows.cli.answers import Answers
    from flows.cli.console import busy, show_plan, show_refusals
    from flows.cli.options import read_spec
    from flows.cli.run_experts import show_reach
    from outliers.machines.providers import provider
    from outliers.planning.plan import make_plan
    from outliers.study.prepare import model_info
    from outliers.workspace import open_workspace

    quiet_libraries()
    spec = read_spec(arguments)
    workspace = open_workspace(spec.compute.workspace)
    _check_options(spec, workspace, console, argv)
    from flows.cli.machines import warn_of_overdue

    warn_of_overdue(workspace, console)
    with busy(console, "counting parameters"):
        plan = make_plan(
            spec, model_info(spec, workspace, weights=False), provider(spec.compute.provider, workspace.root)
        )
    if arguments.json:
        print(plan.model_dump_json())
    else:
        show_plan(Answers(), plan)
        if plan.experts != "off":
            show_reach(Answers(), workspace, plan.model)
        show_refusals(console, plan)
    return REFUSED if plan.refusals and not plan.offers else DONE


def probe_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers probe`."""
    from flows.cli.probes import probe_spec
    from outliers.workspace import open_workspace

    quiet_libraries()
    return _run(probe_spec(arguments, open_workspace(arguments.workspace)), arguments, console, argv)


def merge_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers merge`."""
    from flows.cli.merge import merge_command as merge
    from outliers.workspace import open_workspace

    workspace = open_workspace(arguments.workspace)
    done = merge(workspace, arguments, console)
    if done is not None:
        _finish(*done, workspace, console, as_json=arguments.json)
    return DONE
