"""A finished study as a run of an experiment tracker: MLflow, through mlflow-skinny.

In: a results folder. Out: a run with what was asked for as parameters, the answer as metrics, and the page. A tracker is an
outside place as a store is, so that it gets what may be published and nothing else. It never fails a study: `Tracked` says
what came of it. mlflow is imported late (it takes seconds), its telemetry is off, and every call is bounded in time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from outliers.deadline import within
from outliers.errors import BadInput, OutliersError
from outliers.publish.allowlist import MANIFEST, REPORT, SUMMARY
from outliers.publish.probes import newest_probe
from outliers.publish.publishable import Publishable, read_publishable
from outliers.publish.stores.links import web_link
from outliers.report.card import make_card
from outliers.results.schema import Advice, StudySummary
from outliers.spec import has_login
from outliers.untrusted.visible import visible_line

SCHEME = "mlflow:"
EXPERIMENT = "outliers"
"""Where $MLFLOW_EXPERIMENT_NAME names no other."""
SECONDS = 120.0
"""All of it: a few requests, and a page of some hundred kilobytes."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""What mlflow does unasked is switched off, and its waiting is shortened, where the environment does not say otherwise."""
MAX_PARAM = 500
"""Characters of a parameter: the least that any server takes."""
MAX_NOTE = 5_000
UNPROBED = "none"
"""The tag `probe_id` of a study without a probe: a search can't ask for a tag that is absent."""


@dataclass(frozen=True)
class Tracked:
    """The result of logging a study: `url` is the address of its run, or `why` says why there is no run."""

    url: str | None
    why: str | None = None


def tracking_uri(given: str) -> str:
    """The URI behind `mlflow:`. Raises BadInput for another form, a login in it, or where mlflow-skinny is not installed."""
    uri = given.removeprefix(SCHEME)
    if has_login(uri):
        raise BadInput(
            "--track: a URI must not carry a user or password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        )
    parts = urlsplit(uri)
    there = bool(parts.netloc) if parts.scheme in ("http", "https") else not parts.netloc and len(parts.path) > 1
    if not given.startswith(SCHEME) or parts.scheme not in ("http", "https", "file") or not there:
        raise BadInput("--track takes mlflow:URI, such as mlflow:https://mlflow.example:5000 or mlflow:file:///folder")
    if parts.query or parts.fragment:
        raise BadInput("--track: the URI has a query or fragment, which a tracking server has not; leave it out")
    if importlib.util.find_spec("mlflow") is None:
        raise BadInput("--track needs the package mlflow-skinny: pip install 'outlier-features[mlflow]'")
    return uri


def track(results: Path, uri: str, published: str | None, seconds: float = SECONDS) -> Tracked:
    """Log a finished study at the tracking server `uri`, unless it is there with the same numbers and the same newest probe.

    results: its folder. published: the URL of its manifest; a file:// URL stays here, since it is a path of this machine. Raises
    nothing that a tracker or a folder does.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    began = time.time()
    try:
        study = read_publishable(results)
        advice = _advice(results, study.manifest["study_id"])
        return Tracked(within(seconds, lambda: _log(study, advice, uri, published, began)))
    except TimeoutError:
        why = f"the tracking server did not answer within {seconds:.0f} s"
    # MlflowException, and what HTTP libraries and file systems raise, have no common base but this
    except Exception as error:  # noqa: BLE001 - a finished study is finished, whatever a tracker does
        why = str(error) if isinstance(error, OutliersError) else f"{type(error).__name__}: {error}"
    return Tracked(None, visible_line(" ".join(why.split()), 700))


def _advice(results: Path, study_id: str) -> Advice | None:
    """The verdict of the study's newest probe; None without one. Raises DamagedResults."""
    found = newest_probe(results)
    return found.advice if found is not None and found.advice.study_id == study_id else None


def _log(study: Publishable, advice: Advice | None, uri: str, published: str | None, began: float) -> str:
    """Make the run; its address, or its id in a folder."""
    from mlflow import MlflowClient

    client, manifest = MlflowClient(tracking_uri=uri), study.manifest
    summary = StudySummary.model_validate_json(study.files[SUMMARY], extra="ignore")
    experiment = _experiment(client)
    known = {
        "study_id": summary.study_id,
        "results_digest": manifest["results_digest"],
        "probe_id": UNPROBED if advice is None else advice.probe_id,
    }
    same = [f"tags.{name} = '{value}'" for name, value in known.items()]
    there = client.search_runs([experiment], " and ".join([*same, "attributes.status = 'FINISHED'"]), max_results=1)
    if there:
        return _address(uri, experiment, there[0].info.run_id)
    public = None if published is None or published.startswith("file:") else published
    card = make_card(summary, manifest, advice, public and web_link(public.removesuffix(f"/{MANIFEST}")))
    tags = {
        **known,
        "capture_id": summary.capture_id,
        "mlflow.note.content": card.body[:MAX_NOTE],
        **({} if public is None else {"published": public}),
    }
    name = f"{summary.model.called} {summary.corpus.num_sequences}x{summary.corpus.sequence_length}"
    run = client.create_run(experiment, start_time=int(began * 1000), tags=tags, run_name=name).info.run_id
    try:
        client.log_batch(run, params=list(_params(manifest["spec"])), metrics=list(_metrics(summary, advice)))
        client.log_text(run, study.files[REPORT].decode(), REPORT)
        client.log_text(run, study.files[SUMMARY].decode(), SUMMARY)
        client.log_text(run, card.text, "card.md")
    except BaseException:
        client.set_terminated(run, status="FAILED")
        raise
    client.set_terminated(run)
    return _address(uri, experiment, run)


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


def _address(uri: str, experiment: str, run: str) -> str:
    if uri.startswith("file:"):
        return f"{uri.rstrip('/')}/{experiment}/{run}"
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run}"


def _params(spec: Mapping[str, Any]) -> Iterator[Any]:
    """What was asked for, a parameter for each field of a part: `corpus.num_sequences`."""
    from mlflow.entities import Param

    for part, value in spec.items():
        fields = value.items() if isinstance(value, Mapping) else [(None, value)]
        for name, item in fields:
            if item is not None:
                text = item if isinstance(item, str) else json.dumps(item)
                yield Param(part if name is None else f"{part}.{name}", text[:MAX_PARAM])


def _metrics(summary: StudySummary, advice: Advice | None) -> Iterator[Any]:
    """The answer, and the largest abs(x) of each layer of each site, whose step is the layer."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    found = summary.systematic
    values: dict[str, float | int | None] = {
        "systematic_features": len(found),
        "largest_systematic_magnitude": max((row.max_magnitude for row in found), default=None),
        "massive_activations": summary.massive_count,
        "perplexity": None if summary.perplexity is None else summary.perplexity.value,
        "tokens": summary.corpus.num_tokens,
    }
    for item in () if advice is None else advice.formats:
        weights = "" if item.weights is None else f".weights_{item.weights}"
        values[f"kl.{item.format}{weights}".replace("+", "_")] = item.confirmed_kl
    for name, value in values.items():
        if value is not None:
            yield Metric(name, float(value), now, 0)
    for row in summary.layers:
        if row.max_magnitude is not None:
            yield Metric(f"max_magnitude.{row.site}", row.max_magnitude, now, row.layer)
