"""Many studies, one child each, and how each ended: the flow and the deployment `sweep`.

A study that is there already is answered at once, so that a second run does only what is missing. One failure does not
stop the others; the sweep's own state is then Failed, and says which failed, why, and which are done. `outliers.sweep.sweep`
reads the file; `sweep_children` and `sweep_processes` are the children.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import httpx
from prefect import flow
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field, TypeAdapter, WithJsonSchema

from flows.failures import failed_with, quiet_tracebacks
from flows.hooks.cancelled import rests, was_cancelled, watches
from flows.hooks.stale import begins, ends
from flows.observers import on_sweep
from flows.run_names import sweep_name
from flows.study import Target
from flows.sweep_children import Deployments, Start, Tell, run_studies
from flows.sweep_processes import Processes
from outliers.errors import OutliersError
from outliers.sweep.outcome import Ended, sentence, short, summary
from outliers.sweep.sweep import Sweep, SweepStudy, make_sweep, read_sweep
from outliers.workspace import open_workspace
from tasks.progress import tried_once

# the form shows these, and a server refuses other values before a run exists, whose page would show a target's password
Parallel = Annotated[int, Field(ge=1, le=64)]
Stagger = Annotated[float, Field(ge=0, le=3600)]

# no address with a user or password in it, at any depth of a study; without `properties`, so that the form takes JSON
_PLAIN: dict[str, Any] = {"not": {"type": "string", "pattern": r"://[^/\s]*@"}}
_STORE = {"anyOf": [TypeAdapter(Target).json_schema(), {"type": "null"}]}
_FIELDS = _PLAIN | {"patternProperties": {"": _PLAIN | {"items": _PLAIN}}, "items": _PLAIN}
_STUDY = {
    "type": "object",
    "additionalProperties": True,
    "patternProperties": {"": _FIELDS, "^publish_to$": _STORE},
}
_AXES = {
    "type": "object",
    "patternProperties": {
        "": {"type": "array", "items": _FIELDS},
        "^publish_to$": {"type": "array", "items": _STORE},
    },
}
StudyParts = Annotated[dict[str, Any], WithJsonSchema(_STUDY)]
"""A study, or sections of one, as written; its JSON schema has what a server refuses before a run exists."""
Matrix = Annotated[dict[str, list[Any]], WithJsonSchema(_AXES)]


@flow(
    name="sweep",
    flow_run_name=sweep_name,
    result_serializer="json",
    retries=0,
    on_running=[begins, watches],
    on_completion=[rests, ends],
    on_failure=[rests, ends],
    on_cancellation=[rests, ends],
    on_crashed=[was_cancelled],
)
def sweep(
    file: str | None = None,
    study: list[StudyParts] | None = None,
    defaults: StudyParts | None = None,
    matrix: Matrix | None = None,
    parallel: Parallel | None = None,
    stagger_seconds: Stagger | None = None,
    publish_to: Target | None = None,
    workspace: str | None = None,
    children: Literal["deployment", "process"] = "deployment",
    deployment: str = "study/study",
) -> Any:
    """Run many studies: models, dtypes, corpora, criteria. A study that is there already is answered at once.

    One failure does not stop the others; the sweep's state is then Failed, and says which studies failed and why.

    Args:
        file: path of a SWEEP.toml on the worker's machine; or leave it out, and give `study` with `defaults` and `matrix`
        study: studies, each a StudySpec over the defaults: model, corpus, capture, criteria, compute, publish_to, name
        defaults: parts of a StudySpec that hold for every study
        matrix: field of a StudySpec -> values, such as dtype: [float32, bfloat16]; every combination is a study
        parallel: how many studies run at once, 1 to 64 (default: the file's, else 1)
        stagger_seconds: at least so long between the starts of two models of the hub (default: the file's, else 15)
        publish_to: artifact store of all: s3://bucket/prefix, hf://datasets/ORG/NAME or file:///folder (default: the file's)
        workspace: folder for captures, results and jobs (default: the file's, else $OUTLIERS_WORKSPACE, else ~/.outliers)
        children: deployment: each study is a run of a deployment; process: a process next to the sweep's own
        deployment: which deployment, for children: deployment
    """
    quiet_tracebacks()
    try:
        planned = planned_sweep(file, study, defaults, matrix, parallel, stagger_seconds, publish_to, workspace)
        return run_sweep(planned, children, deployment)
    except OutliersError as error:
        return failed_with(error)


def run_sweep(planned: Sweep, children: str, deployment: str) -> Any:
    """The studies of the flow, and its state or result."""
    board = Board(planned, on_sweep.get())
    ended = run_studies(planned, _starter(planned, children, deployment), board.tell)
    failed = [end for end in ended if end.state != "done"]
    said = summary(ended) + (f". First: {planned.remedy}" if failed and planned.remedy else "")
    get_run_logger().info("%s", said)
    return Failed(message=said) if failed else [end.model_dump() for end in ended]


def planned_sweep(
    file: str | None,
    study: list[dict[str, Any]] | None,
    defaults: dict[str, Any] | None,
    matrix: dict[str, list[Any]] | None,
    parallel: int | None,
    stagger_seconds: float | None,
    publish_to: str | None,
    workspace: str | None,
) -> Sweep:
    """The sweep that the parameters mean. Raises BadInput."""
    changes: dict[str, Any] = {"publish_to": publish_to} if publish_to else {}
    if workspace:
        changes["compute"] = {"workspace": str(Path(workspace).expanduser().absolute())}
    given = {
        "study": study,
        "defaults": defaults,
        "matrix": matrix,
        "parallel": parallel,
        "stagger_seconds": stagger_seconds,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    return read_sweep(Path(file), changes, settings) if file else make_sweep(settings, "sweep", None, changes)


def make_run_folder(planned: Sweep) -> Path:
    """A new folder for the children's files: <workspace of the first study>/sweeps/NAME/DATE-TIME-xxxxxxxx.

    Two sweeps of one name may run at once, so each run has a folder of its own.
    """
    place = open_workspace(planned.studies[0].spec.compute.workspace).root / "sweeps" / planned.name
    place.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=place))


def _starter(planned: Sweep, children: str, deployment: str) -> Start:
    if children == "deployment":
        return Deployments(deployment, str(flow_run.id), get_run_logger().warning)
    with get_client(sync_client=True) as client:
        # also the address of a server that this process started for itself
        address = str(client.api_url)
    folder = make_run_folder(planned)
    get_run_logger().info("what each study's process says is in %s", folder)
    return Processes(folder, address)


class Board:
    """The sweep's table and progress in the Prefect UI, its log, and the observer of the flow."""

    def __init__(self, planned: Sweep, observe: Tell) -> None:
        self._sweep, self._observe = planned, observe
        self._running: set[str] = set()
        self._ended: dict[str, Ended] = {}
        # a key takes small letters, digits and dashes
        self._key = re.sub(r"[^a-z0-9]+", "-", f"sweep-{planned.name}".lower()).strip("-")
        self._progress: UUID | None = None
        self._show()

    def tell(self, study: SweepStudy, end: Ended | None) -> None:
        """A study started (None), or ended."""
        if end is None:
            self._running.add(study.name)
        else:
            self._running.discard(study.name)
            self._ended[study.name] = end
        get_run_logger().info("%s", sentence(study, end))
        self._observe(study, end)
        self._show()

    def _show(self) -> None:
        rows = [self._row(study) for study in self._sweep.studies]
        share, said = 100.0 * len(self._ended) / len(rows), f"{len(self._ended)} of {len(rows)} studies have ended"
        try:
            with tried_once():
                create_table_artifact(table=rows, key=self._key, description=said)
                if self._progress is None:
                    made = create_progress_artifact(progress=share, key=f"{self._key}-progress", description=said)
                    self._progress = made if isinstance(made, UUID) else None
                else:
                    update_progress_artifact(self._progress, progress=share, description=said)
        except (PrefectException, httpx.HTTPError) as error:
            # a server that does not answer for a moment must not end the studies; the next change shows all
            get_run_logger().warning("the sweep's table could not be shown: %s", error)

    def _row(self, study: SweepStudy) -> dict[str, Any]:
        end = self._ended.get(study.name)
        return {
            "study": study.name,
            "model": study.spec.model.id,
            "state": end.word if end else "running" if study.name in self._running else "waiting",
            "features": None if end is None else end.features,
            "seconds": None if end is None else end.seconds,
            "results": None if end is None else end.published or end.report,
            "reason": "" if end is None else short(end.reason),
        }
