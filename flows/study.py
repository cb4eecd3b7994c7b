"""One study, top to bottom: the main flow, and the deployment `study`."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any, Literal

from prefect import Flow, State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.futures import wait
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.artifacts import show_outcome
from flows.hooks.cancelled import rests, was_cancelled, watches
from flows.hooks.stale import begins, ends
from outliers.counting.shards import is_here
from outliers.dispatch.leases import Tenancy
from outliers.dispatch.run import GUARDS
from outliers.dispatch.shard import STOP, forget_parts, merge, shard, stop_if_cancelled, told_of_parts
from outliers.dispatch.state import machine_state
from outliers.dispatch.transfer import check_travels
from outliers.machines.options import check_options
from outliers.machines.providers import provider
from outliers.publish.outcome import Outcome, find_finished, find_outcome, make_outcome
from outliers.publish.publish import check_target
from outliers.spec import CaptureSpec, ComputeSpec, CorpusSpec, CriteriaSpec, ModelSpec, StudySpec, chosen
from outliers.study.parts import split
from outliers.study.prepare import Prepared, prepare
from outliers.workspace import Workspace, open_workspace
from tasks.analyze import analyze
from tasks.extract import extract
from tasks.limits import machine_slot
from tasks.provision import provision
from tasks.sync import sync

POLL_SECONDS = 0.2
CANCEL_SECONDS = 25.0
"""Prefect ends a cancelled run 30 s after it was told."""


Target = Annotated[str, Field(pattern=r"^(s3://[^/@?#]+(/[^?#]*)?|file:///[^?#]+)$", title="artifact store")]
"""As StudySpec asks it, so that a deployment refuses it before a run exists: a run's parameters are there for all to read."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def short_name(model: ModelSpec | str | dict[str, Any]) -> str:
    """`SmolLM2-135M`, from what was asked: nothing is looked up for a name."""
    name = model if isinstance(model, str) else ModelSpec.model_validate(model).id
    return name.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:").removesuffix(".gguf")


def run_name() -> str:
    """`study SmolLM2-135M 8x512`."""
    asked = flow_run.parameters
    corpus = asked.get("corpus") or {}
    shape = CorpusSpec.model_validate({"source": corpus} if isinstance(corpus, str) else corpus)
    return f"study {short_name(asked['model'])} {shape.num_sequences}x{shape.sequence_length}"


def tag_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Tag a run that begins with its model and provider, such as `model:SmolLM2-135M` and `provider:ssh`.

    A hook of the flow: the tags of a deployment are the same for all its runs, and `prefect.tags` is for tasks within.
    """
    asked = flow_run.parameters
    compute = ComputeSpec.model_validate(asked.get("compute") or {})
    tags = {*flow_run.tags, f"model:{short_name(asked['model'])}", f"provider:{chosen(compute.provider)}"}
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=sorted(tags))


@flow(
    name="study",
    flow_run_name=run_name,
    result_serializer="json",
    retries=0,
    on_running=[begins, watches, tag_run],
    on_completion=[rests, ends],
    on_failure=[rests, ends],
    on_cancellation=[rests, ends],
    on_crashed=[was_cancelled],
    # Prefect's types ask for a runner of any future; this one is what `flow` documents
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # type: ignore[arg-type]
)
def study(
    model: ModelSpec | str,
    corpus: CorpusSpec | str = CorpusSpec(),
    capture: CaptureSpec = CaptureSpec(),
    criteria: CriteriaSpec = CriteriaSpec(),
    compute: ComputeSpec = ComputeSpec(),
    publish_to: Target | None = None,
    label: Label | None = None,
    publish_text: Literal["auto", "none", "context"] = "auto",
    publish_log: bool = False,
) -> dict[str, Any]:
    """Find the systematic outlier features of a language model, exactly.

    Reads every layer's activations in one forward pass into Zarr on the machine's disk, counts them there, and
    publishes a few kilobytes. A study that is published at the target already is answered at once.

    Args:
        model: a hub id such as Qwen/Qwen3-30B-A3B, a folder, a .gguf file, or builtin:smollm2
        corpus: a text file, a folder, a data set's name on the hub, or builtin:python-docs; how many tokens of it
        capture: which activations are kept on the machine's disk
        criteria: what counts as a systematic outlier feature
        compute: which machine, and for how much
        publish_to: artifact store, s3://bucket/prefix or file:///folder; none keeps the results in the workspace
        label: part of the study's id, for a second publication of the same study from other hardware
        publish_text: auto, none or context: whether the text around outliers is published
        publish_log: publish the log too, with paths and host names taken out
    """
    spec = StudySpec.model_validate(
        {
            "model": model,
            "corpus": corpus,
            "capture": capture,
            "criteria": criteria,
            "compute": compute,
            "publish_to": publish_to,
            "label": label,
            "publish_text": publish_text,
            "publish_log": publish_log,
        }
    )
    # the library's own lines (PREFECT_LOGGING_EXTRA_LOGGERS=outliers) from INFO up
    logging.getLogger("outliers").setLevel(logging.INFO)
    check_options(spec.compute)  # before a model is looked for
    workspace = open_workspace(spec.compute.workspace)
    prepared = prepare(spec, workspace)
    outcome = find_outcome(prepared, workspace) or run(prepared, workspace)
    forget_parts(prepared, workspace)
    show_outcome(outcome, workspace.study(prepared.study_id))
    get_run_logger().info(
        "%d systematic outlier features%s; %s",
        len(outcome.systematic),
        " (the study was there already)" if outcome.cached else "",
        outcome.published or outcome.results,
    )
    return outcome.model_dump()


def run(prepared: Prepared, workspace: Workspace) -> Outcome:
    """The steps of a study that isn't there yet. They are called, not submitted: a cancelled run passes through here.

    Results that are home are published, and nothing else is done: they need no machine.
    """
    get_run_logger().info("study %s, capture %s", prepared.study_id, prepared.capture_id)
    if prepared.spec.publish_to is not None:
        check_target(prepared.spec.publish_to)
    spread = prepared.spec.compute.shards > 1
    if (found := find_finished(prepared, workspace)) is not None:
        get_run_logger().info("the results are in the workspace: they are published, no machine is asked for")
        made_on = told_of_parts(prepared, workspace) if spread else {}
        counted = {"results_digest": found["results_digest"], "files": len(found["files"])}
    else:
        check_travels(prepared)
        made_on, counted = (run_parts if spread else run_whole)(prepared, workspace)
    published = sync.with_options(refresh_cache=True)(prepared, made_on, workspace, counted)
    return make_outcome(prepared, workspace, published=published, cached=False)


def run_whole(prepared: Prepared, workspace: Workspace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study on one machine, to its results in the workspace: (what made them, what the analysis says).

    The machine is given back with them: a store that is away is not waited for on a machine that is paid.
    """
    source = provider(prepared.spec.compute.provider, workspace.root)
    holder = str(flow_run.id or prepared.study_id)
    # the slot first: it is given back once the machine is
    with machine_slot(prepared.spec.compute.provider), Tenancy(source, prepared, workspace, holder) as tenancy:
        machine = provision(prepared, workspace, tenancy)
        tenancy.opened(machine)
        state = machine_state(machine, prepared, workspace)
        tenancy.kept_work |= state["capture"]
        extracted = extract.with_options(refresh_cache=not state["capture"])(prepared, machine, workspace)
        analyzed = analyze.with_options(refresh_cache=not state["results"])(
            prepared, machine, workspace, extracted, state["results"]
        )
        return {"machine": dict(machine.provenance)}, analyzed


def run_parts(prepared: Prepared, workspace: Workspace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study that is spread: each part on a machine of its own, at once; then their summaries are joined here.

    The parts are submitted, to run at once; a cancelled run tells them, waits for them, and only then ends.
    """
    parts = split(prepared, prepared.spec.compute.shards)
    holder, logger = str(flow_run.id or prepared.study_id), get_run_logger()
    STOP.clear()
    GUARDS.append(stop_if_cancelled)
    try:
        futures = [
            shard.with_options(refresh_cache=not is_here(part, prepared, workspace)).submit(
                prepared, part, workspace, holder
            )
            for part in parts
        ]
        try:
            while not all(future.state.is_final() for future in futures):
                time.sleep(POLL_SECONDS)
        except BaseException:
            logger.warning("cancelled: ending %d parts", len(parts))
            STOP.set()
            wait(futures, timeout=CANCEL_SECONDS)
            raise
        failed = [
            (part, future) for part, future in zip(parts, futures, strict=True) if not future.state.is_completed()
        ]
        for part, future in failed:
            logger.error("part %s (sequences %s) failed: %s", part.title, part.span, future.state.message)
        if failed:
            # the first error is the run's; what the other parts have is kept, and Retry redoes the failed ones alone
            failed[0][1].result()
    finally:
        GUARDS.remove(stop_if_cancelled)
    return told_of_parts(prepared, workspace), merge.with_options(refresh_cache=True)(prepared, parts, workspace)
