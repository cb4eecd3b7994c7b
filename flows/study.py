"""One study, top to bottom: the main flow, and the deployment `study`."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from prefect import Flow, State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.artifacts import show_outcome
from flows.failures import failed_with, quiet_tracebacks
from flows.hooks.cancelled import rests, was_cancelled, watches
from flows.hooks.stale import begins, ends
from flows.observers import on_study
from flows.run_names import described, short_name, study_name
from outliers.dispatch.shard import forget_shards
from outliers.dispatch.study import dispatch_study
from outliers.dispatch.study_run import StudyRun
from outliers.errors import OutliersError
from outliers.events.stream import Lines
from outliers.machines.options import check_options
from outliers.publish.outcome import find_outcome
from outliers.spec import (
    STORE_PATTERN,
    CaptureSpec,
    ComputeSpec,
    CorpusSpec,
    CriteriaSpec,
    FormatsSpec,
    ModelSpec,
    ProbeSpec,
    StudySpec,
    chosen,
)
from outliers.study.prepare import parse_spec
from outliers.units import plural
from outliers.workspace import open_workspace
from tasks.prepare import prepare
from tasks.steps import TaskSteps

Target = Annotated[str, Field(pattern=STORE_PATTERN, title="artifact store")]
"""StudySpec's own pattern, so that a deployment refuses other targets before a run exists, whose parameters all can read."""
Named = Annotated[str, Field(title="name")]
Usual = Annotated[None, Field(title="as usual")]
"""A section that is left as it is: the form shows it folded."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def tag_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Tag a run, as it begins, with its model and provider, such as `model:SmolLM2-135M-Instruct` and `provider:ssh`.

    A hook of the flow: the tags of a deployment are the same for all its runs, and `prefect.tags` is for tasks within.
    """
    asked = flow_run.parameters
    compute = ComputeSpec.model_validate(asked.get("compute") or {})
    tags = {*flow_run.tags, f"model:{short_name(asked['model'])}", f"provider:{chosen(compute.provider)}"}
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=sorted(tags))


@flow(
    name="study",
    flow_run_name=study_name,
    result_serializer="json",
    retries=0,
    # the body does, and says in one line what is wrong: Prefect would raise before it
    validate_parameters=False,
    on_running=[begins, watches, tag_run],
    on_completion=[rests, ends],
    on_failure=[rests, ends],
    on_cancellation=[rests, ends],
    on_crashed=[was_cancelled],
    # Prefect's types ask for a runner of any future; this one is what `flow` documents
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # type: ignore[arg-type]
)
def study(
    model: Named | ModelSpec,
    corpus: Named | CorpusSpec = CorpusSpec(),
    publish_to: Target | None = None,
    compute: Usual | ComputeSpec = None,
    capture: Usual | CaptureSpec = None,
    criteria: Usual | CriteriaSpec = None,
    formats: Usual | FormatsSpec = None,
    probe: Usual | ProbeSpec = None,
    label: Label | None = None,
    publish_text: Literal["auto", "none", "context"] = "auto",
    publish_log: bool = False,
) -> Any:
    """Find the systematic outlier features of a language model, exactly.

    Reads every layer's activations in one forward pass into Zarr on the machine's disk, counts them there, and
    publishes a few kilobytes. A study that is published at the target already is answered at once.

    Args:
        model: a hub id such as Qwen/Qwen3-30B-A3B, a folder, a .gguf file, or builtin:smollm2
        corpus: a text file, a folder, a data set's name on the hub, or builtin:python-docs; how many tokens of it
        publish_to: artifact store, s3://bucket/prefix, hf://datasets/ORG/NAME or file:///folder; none: the results stay
        compute: which machine, and for how much; as usual: this one, with what GPUs it has
        capture: which activations are kept on the machine's disk; as usual: attn_in and mlp_in of all layers
        criteria: what counts as a systematic outlier feature; as usual: the rule of LLM.int8()
        formats: number formats whose error is measured on the activations; as usual: none
        probe: what is changed in the model to see what that does to it; as usual: nothing
        label: part of the study's id, for a second publication of the same study from other hardware
        publish_text: auto, none or context: whether the text around outliers is published
        publish_log: publish the log too, with paths and host names taken out
    """
    quiet_tracebacks()
    # the library's own lines (PREFECT_LOGGING_EXTRA_LOGGERS=outliers) from INFO up
    logging.getLogger("outliers").setLevel(logging.INFO)
    asked = {
        "model": model,
        "corpus": corpus,
        "capture": capture,
        "criteria": criteria,
        "formats": formats,
        "probe": probe,
        "compute": compute,
        "publish_to": publish_to,
        "label": label,
        "publish_text": publish_text,
        "publish_log": publish_log,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return run_study(parse_spec(given, "the parameters"))
    except OutliersError as error:
        return failed_with(error)


def run_study(spec: StudySpec) -> dict[str, Any]:
    """The steps of the flow."""
    check_options(spec.compute)  # before a model is looked for
    workspace = open_workspace(spec.compute.workspace)
    prepared = prepare(spec, workspace, described(spec))
    run = StudyRun(prepared, workspace, str(flow_run.id or prepared.study_id), Lines(get_run_logger()))
    on_study.get()(run)
    outcome = find_outcome(prepared, workspace) or dispatch_study(run, TaskSteps())
    forget_shards(run)
    show_outcome(outcome, prepared, workspace.study(prepared.study_id))
    get_run_logger().info(
        "%d systematic outlier feature%s%s; %s",
        len(outcome.systematic),
        plural(len(outcome.systematic)),
        " (the study was there already)" if outcome.cached else "",
        outcome.published or outcome.results,
    )
    return outcome.model_dump()
