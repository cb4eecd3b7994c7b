"""A study in the process that asks for it: the plan, then the steps one after the other, on this computer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outliers.api.studies import Study, open_study
from outliers.errors import BadInput
from outliers.spec import DEFAULT_PROVIDER, StudySpec, chosen
from outliers.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from outliers.events.stream import Reporter
    from outliers.planning.plan import Plan
    from outliers.study.prepare import Prepared


def plan(spec: StudySpec) -> Plan:
    """Which machines hold a study, how long it takes there, and what it costs; nothing is downloaded but the model's config.

    The machines are those of `spec.compute.provider`. Raises BadInput and its kinds for a spec that can't be satisfied,
    HubUnavailable where the hub does not answer.
    """
    from outliers.machines.options import check_options
    from outliers.machines.providers import provider
    from outliers.planning.plan import make_plan
    from outliers.study.prepare import model_info

    workspace = open_workspace(spec.compute.workspace)
    check_options(spec.compute)
    info = model_info(spec, workspace, weights=False)
    return make_plan(spec, info, provider(spec.compute.provider, workspace.root))


def run_study(spec: StudySpec, *, progress: bool = True) -> Study:
    """Run a study on this computer, in this process, and open its results; one that is finished is opened at once.

    It goes on where an earlier run was interrupted, also one of the command. spec.compute.workspace: where captures and
    results are kept (default: $OUTLIERS_WORKSPACE, else ~/.outliers). progress: lines on standard error. Raises BadInput for
    a spec that can't be satisfied or that names another machine, PlanRefused where this computer can't hold the study, and the
    errors of the steps (docs/reliability.md).
    """
    from outliers.events.stream import ConsoleReporter
    from outliers.machines.options import check_options
    from outliers.publish.outcome import find_outcome
    from outliers.publish.publish import check_target
    from outliers.study.prepare import prepare

    _check_here(spec)
    check_options(spec.compute)
    workspace = open_workspace(spec.compute.workspace)
    prepared = prepare(spec, workspace)
    if find_outcome(prepared, workspace) is None:
        if spec.publish_to is not None:
            check_target(spec.publish_to)
        _finish(prepared, workspace, ConsoleReporter() if progress else Quiet())
    return open_study(workspace.study(prepared.study_id))


def _check_here(spec: StudySpec) -> None:
    """Refuse what only the command and the deployment do."""
    meant = chosen(spec.compute.provider)
    if meant != DEFAULT_PROVIDER or spec.compute.shards > 1:
        what = f"on provider {meant}" if meant != DEFAULT_PROVIDER else f"as {spec.compute.shards} shards"
        raise BadInput(
            f"run_study computes in this process, and the spec asks for a study {what}: run it with `outliers study` or the "
            "deployment `study`, and open its results with open_study"
        )


def _finish(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> None:
    """Do what a study still lacks: its capture, its counts, its results, its publication."""
    from outliers.dispatch.steps import sync_study
    from outliers.dispatch.study_run import StudyRun
    from outliers.machines.local import LocalMachine
    from outliers.machines.providers import provider
    from outliers.planning.remaining import check_rest
    from outliers.probe.checks import check_before
    from outliers.publish.outcome import find_finished
    from outliers.publish.own import keep_names
    from outliers.publish.probes import is_probed, receive_probe
    from outliers.steps import capture_exists, run_analyze, run_extract, run_probe, run_report

    if prepared.spec.probe.asked:
        check_before(prepared)
    keep_names(prepared, workspace)
    found = find_finished(prepared, workspace)
    if found is None:
        check_rest(prepared, workspace, provider(DEFAULT_PROVIDER, workspace.root))
        if not capture_exists(prepared, workspace):
            run_extract(prepared, workspace, reporter)
        run_analyze(prepared, workspace, reporter)
        found = run_report(prepared, workspace, reporter)
    if not is_probed(prepared, workspace):
        if not capture_exists(prepared, workspace):
            run_extract(prepared, workspace, reporter)
        run_probe(prepared, workspace, reporter)
        receive_probe(prepared, LocalMachine(workspace.root), workspace)
    sync_study(
        StudyRun(prepared, workspace, prepared.study_id, reporter), {}, {"results_digest": found["results_digest"]}
    )


class Quiet:
    """A Reporter that shows nothing."""

    def log(self, level: str, message: str) -> None:
        """Pass over a message."""

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        """Pass over progress."""
