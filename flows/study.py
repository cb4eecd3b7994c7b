"""One study, top to bottom: the main flow, and the deployment `study`."""

from __future__ import annotations

import logging
from typing import Any, Literal

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.artifacts import show_outcome
from outliers.outcome import Outcome, find_outcome, make_outcome
from outliers.prepare import Prepared, prepare
from outliers.publish import check_target
from outliers.spec import CaptureSpec, ComputeSpec, CorpusSpec, CriteriaSpec, ModelSpec, StudySpec
from outliers.workspace import Workspace, open_workspace
from tasks.analyze import analyze
from tasks.extract import extract
from tasks.provision import provision
from tasks.state import machine_state
from tasks.sync import sync


def run_name() -> str:
    """`study SmolLM2-135M 8x512`, from what was asked: nothing is looked up for a name."""
    asked = flow_run.parameters
    model, corpus = asked["model"], asked.get("corpus") or {}
    name = model if isinstance(model, str) else ModelSpec.model_validate(model).id
    shape = CorpusSpec.model_validate({"source": corpus} if isinstance(corpus, str) else corpus)
    short = name.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:").removesuffix(".gguf")
    return f"study {short} {shape.num_sequences}x{shape.sequence_length}"


@flow(name="study", flow_run_name=run_name, result_serializer="json", retries=0)
def study(
    model: ModelSpec | str,
    corpus: CorpusSpec | str = CorpusSpec(),
    capture: CaptureSpec = CaptureSpec(),
    criteria: CriteriaSpec = CriteriaSpec(),
    compute: ComputeSpec = ComputeSpec(),
    publish_to: str | None = None,
    label: str | None = None,
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
    workspace = open_workspace(spec.compute.workspace)
    prepared = prepare(spec, workspace)
    outcome = find_outcome(prepared, workspace) or run(prepared, workspace)
    show_outcome(outcome, workspace.study(prepared.study_id))
    get_run_logger().info(
        "%d systematic outlier features%s; %s",
        len(outcome.systematic),
        " (the study was there already)" if outcome.cached else "",
        outcome.published or outcome.results,
    )
    return outcome.model_dump()


def run(prepared: Prepared, workspace: Workspace) -> Outcome:
    """The steps of a study that isn't there yet. They are called, not submitted: a cancelled run passes through here."""
    get_run_logger().info("study %s, capture %s", prepared.study_id, prepared.capture_id)
    if prepared.spec.publish_to is not None:
        check_target(prepared.spec.publish_to)
    machine = provision(prepared, workspace)
    state = machine_state(machine, prepared)
    extracted = extract.with_options(refresh_cache=not state["capture"])(prepared, machine, workspace)
    analyzed = analyze.with_options(refresh_cache=not state["results"])(prepared, machine, workspace, extracted)
    published = sync.with_options(refresh_cache=True)(prepared, machine, workspace, analyzed)
    return make_outcome(prepared, workspace, published=published, cached=False)
