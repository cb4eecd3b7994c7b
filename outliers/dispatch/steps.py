"""The steps of a study on a machine, from its lease to its publication: one call each, without Prefect.

`DirectSteps` calls them in this process. The flow calls them as Prefect tasks (`tasks.steps`), which add retries, cached
results and progress pages. `study.dispatch_study` puts them in order, and knows neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import Any, Protocol

from outliers.dispatch.leases import MachineLease
from outliers.dispatch.run import run_step
from outliers.dispatch.shard import make_shard, merge_shards
from outliers.dispatch.study_run import StudyRun
from outliers.errors import PublishRefused
from outliers.events.stream import Reporter
from outliers.machines.base import Machine
from outliers.planning.offers import request_again
from outliers.planning.remaining import check_rest
from outliers.publish.allowlist import check_listing, read_log, read_numbers
from outliers.publish.manifest import read_manifest
from outliers.publish.own import is_private, private_words
from outliers.publish.probes import publish_probe, receive_probe
from outliers.publish.publish import model_slug, publish_study
from outliers.publish.publishable import Publishable, make_publishable, write_publishable
from outliers.publish.received import receive_study
from outliers.publish.reporting import alone, render_here
from outliers.study.demand import demand_of
from outliers.study.parts import Shard
from outliers.study.probes import placed_probe, probe_id


class PendingShard(Protocol):
    """A shard that is being made."""

    def done(self) -> bool:
        """Whether it has ended, one way or the other."""

    def failure(self) -> str | None:
        """Why it failed; None where it succeeded. Of a shard that has ended."""

    def result(self) -> Any:
        """The shard's record; raises its error. Of a shard that has ended."""

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most this long; raises nothing of its own."""


class Steps(Protocol):
    """How the steps of a study are called.

    `again`: what a step has left on the machine is gone, so no cached result of it holds.
    """

    def slot(self, run: StudyRun) -> contextlib.AbstractContextManager[None]:
        """A place among the machines at work, held while the block runs."""

    def provision(self, lease: MachineLease) -> Machine:
        """As `provision_machine`."""

    def extract(self, run: StudyRun, machine: Machine, *, again: bool) -> dict[str, Any]:
        """As `extract_study`."""

    def analyze(self, run: StudyRun, machine: Machine, extracted: dict[str, Any], *, finished: bool) -> dict[str, Any]:
        """As `analyze_study`. `extracted`: what `extract` returned, which comes before."""

    def probe(self, run: StudyRun, machine: Machine, analyzed: dict[str, Any]) -> dict[str, Any]:
        """As `probe_study`. `analyzed`: what `analyze` returned, which comes before."""

    def start_shard(self, run: StudyRun, part: Shard, *, again: bool) -> PendingShard:
        """Start `make_shard`, which goes on in the background."""

    def merge(self, run: StudyRun, parts: tuple[Shard, ...]) -> dict[str, Any]:
        """As `merge_shards`."""

    def sync(self, run: StudyRun, made_on: dict[str, Any], analyzed: dict[str, Any]) -> str | None:
        """As `sync_study`."""


def provision_machine(lease: MachineLease, reporter: Reporter) -> Machine:
    """Find or rent the machine of a study; it is held from now on. Raises PlanRefused, with every reason, where none fits."""
    run, source = lease.run, lease.source
    if any(rental.name == lease.name and rental.state == "up" for rental in source.list()):
        # it was chosen before, and what its disk has already needs no room; one whose launch failed is chosen anew
        request = request_again(demand_of(run.prepared.spec, run.prepared.model))
    else:
        request = check_rest(run.prepared, run.workspace, source)
    machine = source.ensure(lease.name, request, lease.holder, run.prepared.title)
    reporter.log("info", f"machine {machine.name} ({machine.provider}), ${machine.price_per_hour:.2f} an hour")
    return machine


def extract_study(run: StudyRun, machine: Machine, reporter: Reporter) -> dict[str, Any]:
    """Read the activations of every layer on the machine, in one pass, from where the journal ends.

    Returns what was read: sequences, tokens, bytes, seconds, device.
    """
    return run_step(run, machine, "extract", f"extract-{run.prepared.extraction}", reporter)


def analyze_study(run: StudyRun, machine: Machine, reporter: Reporter, *, finished: bool) -> dict[str, Any]:
    """Count on the machine that has the capture, bring the numbers home, render them here: kilobytes, never activations.

    Returns the digest of the results, seconds, files. `finished`: the machine has the numbers, so they are only brought
    home.
    """
    prepared, workspace = run.prepared, run.workspace
    if finished:
        return receive_study(prepared, machine, workspace, reporter)
    counted = run_step(run, machine, "analyze", f"analyze-{prepared.study_id}", reporter)
    written = run_step(run, machine, "report", f"report-{prepared.study_id}", reporter, options=("--numbers",))
    return counted | receive_study(prepared, machine, workspace, reporter, str(written.get("results_digest")))


def probe_study(run: StudyRun, machine: Machine, reporter: Reporter) -> dict[str, Any]:
    """Make the study's probe on the machine, bring its numbers home, and draw the verdict from them here.

    Returns the probe's id, and what was measured in short. A probe that was stopped goes on where its journal ends.
    """
    prepared, workspace = run.prepared, run.workspace
    made = run_step(run, machine, "probe", f"probe-{probe_id(prepared)}", reporter)
    return made | receive_probe(prepared, machine, workspace)


def sync_study(run: StudyRun, made_on: dict[str, Any], analyzed: dict[str, Any]) -> str | None:
    """Publish the results folder at the artifact store, from this computer, which has the store's keys.

    Returns the URL of the published manifest, or None where the study has no target.

    Args:
        run: the run whose study is published
        made_on: what the manifest says of the machine, or of the shards
        analyzed: what the analysis returned; names the results that are to be published

    Raises PublishRefused where the results were changed since the analysis, and the errors of stores.
    """
    prepared, workspace = run.prepared, run.workspace
    with alone(prepared, workspace):
        study = _write(run, made_on, analyzed)
    if study is None or prepared.spec.publish_to is None:
        return None
    check_listing(workspace.study(prepared.study_id))
    slug = model_slug(prepared.model.source.id)
    url = publish_study(study, prepared.spec.publish_to, slug)
    if prepared.spec.probe.asked:
        names = (prepared.public_model, prepared.public_corpus)
        publish_probe(placed_probe(prepared, workspace), prepared.spec.publish_to, slug, names)
    return url


def _write(run: StudyRun, made_on: dict[str, Any], analyzed: dict[str, Any]) -> Publishable | None:
    """Render the study from the numbers in the results folder, with its whole manifest, and write it there.

    What is published, None without a target: of a study with names or text of this machine alone it is rendered apart.
    """
    prepared = run.prepared
    folder = run.workspace.study(prepared.study_id)
    known = (read_manifest(folder) or {}).get("provenance", {})
    numbers, known = read_numbers(folder), known | made_on
    log = read_log(folder, private_words(prepared)) if prepared.spec.publish_log else None
    study = render_here(prepared, run.workspace, numbers, known, log)
    if study.manifest["results_digest"] != analyzed["results_digest"]:
        raise PublishRefused(
            f"the results in {folder} have digest {study.manifest['results_digest'][:12]}, the analysis made "
            f"{analyzed['results_digest'][:12]}: they were changed since; run the study again"
        )
    # last: a manifest vouches for the files
    write_publishable(folder, study)
    if prepared.spec.publish_to is None:
        return None
    if not is_private(prepared):
        return study
    return make_publishable(numbers, spec=prepared.public_spec(), provenance=known, log=log, beside=folder)


class DirectSteps:
    """Calls each step in this process. A step that fails ends the run; the same run again goes on from the journal."""

    @contextlib.contextmanager
    def slot(self, run: StudyRun) -> Iterator[None]:
        """No limit."""
        yield

    def provision(self, lease: MachineLease) -> Machine:
        return provision_machine(lease, lease.run.reporter)

    def extract(self, run: StudyRun, machine: Machine, *, again: bool) -> dict[str, Any]:
        return extract_study(run, machine, run.reporter)

    def analyze(self, run: StudyRun, machine: Machine, extracted: dict[str, Any], *, finished: bool) -> dict[str, Any]:
        return analyze_study(run, machine, run.reporter, finished=finished)

    def probe(self, run: StudyRun, machine: Machine, analyzed: dict[str, Any]) -> dict[str, Any]:
        return probe_study(run, machine, run.reporter)

    def start_shard(self, run: StudyRun, part: Shard, *, again: bool) -> PendingShard:
        pool = ThreadPoolExecutor(1, thread_name_prefix=f"shard{part.suffix}")
        begun = pool.submit(make_shard, run, part, run.reporter, lambda: self.slot(run))
        pool.shutdown(wait=False)
        return _ThreadShard(begun)

    def merge(self, run: StudyRun, parts: tuple[Shard, ...]) -> dict[str, Any]:
        return merge_shards(run, parts, run.reporter)

    def sync(self, run: StudyRun, made_on: dict[str, Any], analyzed: dict[str, Any]) -> str | None:
        return sync_study(run, made_on, analyzed)


class _ThreadShard:
    """A shard that a thread of this process makes."""

    def __init__(self, future: Future[dict[str, Any]]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def failure(self) -> str | None:
        error = self._future.exception(0)
        return None if error is None else f"{type(error).__name__}: {error}"

    def result(self) -> dict[str, Any]:
        return self._future.result(0)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(StillRunning):
            self._future.exception(seconds)
