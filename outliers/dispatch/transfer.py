"""What is sent of a study to another machine: its spec, its token ids, a token for the hub, and a model only on request.

These are kilobytes, unless --upload-model sends weights that are on this computer alone. To this computer nothing is sent:
its steps read the same workspace.
"""

from __future__ import annotations

import os
from pathlib import Path

from outliers.dispatch.study_run import StudyRun
from outliers.errors import PlanRefused
from outliers.files.sealed import write_sealed
from outliers.hub.cache import FOLDER_VARIABLE
from outliers.machines.base import Machine
from outliers.machines.lease import HUB, UPLOADS
from outliers.model.source import ModelSource
from outliers.spec import DEFAULT_PROVIDER, ComputeSpec, chosen
from outliers.study.prepare import Prepared

HERE = DEFAULT_PROVIDER
KEPT_OF_COMPUTE = {"gpu_count", "processes", "executor"}
"""Fields of `compute` that a machine reads. No price, host or folder of this computer is among them."""
KEPT_OF_GPUS = {"gpu_filter", "min_vram"}
"""Fields that select among a machine's GPUs. A rented machine does not get them: it was rented for its GPUs by a catalog's
name, which is not the driver's."""


def check_transfer(prepared: Prepared) -> None:
    """Refuse a study on another machine whose model is on this computer and may not be sent. Raises PlanRefused."""
    compute, source = prepared.spec.compute, prepared.model.source
    if chosen(compute.provider) == HERE or source.kind == "hub" or compute.upload_model:
        return
    raise PlanRefused(
        f"{source.name} is on this machine, not on the hub, and {compute.provider or 'the provider'} would need its "
        f"{model_bytes(source) / 1e6:,.0f} MB: --upload-model sends it (once for a machine)"
    )


def model_bytes(source: ModelSource) -> int:
    """Bytes of the files that are sent for a model on this computer."""
    return sum(path.stat().st_size for path in model_files(source))


def model_files(source: ModelSource) -> tuple[Path, ...]:
    """The files of a model on this computer; of a folder only those that its revision is the hash of."""
    from outliers.model.folder import model_files

    place = Path(source.path)
    return (place,) if place.is_file() else model_files(place)


def send_study(run: StudyRun, machine: Machine, prepared: Prepared | None = None) -> str:
    """Put the run's study on a machine as the file that every step reads; returns its path there.

    `prepared`: the study as this machine reads it (default: the run's).
    """
    prepared, workspace = prepared or run.prepared, run.workspace
    place = f"studies/{prepared.study_id}.json"
    away = machine.provider != HERE
    content = _for_machine(machine, prepared) if away else prepared
    local = workspace.root / ("sent" if away else "studies") / f"{prepared.study_id}.json"
    local.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(local, content.model_dump(mode="json"))
    _send_once(run, machine, local, place, content.model_dump_json())
    if away:
        corpus = f"corpora/{prepared.corpus.key}"
        _send_once(run, machine, workspace.root / corpus, corpus, prepared.corpus.key)
    return f"{machine.workspace}/{place}"


def send_model(run: StudyRun, machine: Machine) -> None:
    """Send the files of a model that is on this computer alone; nothing for a model of the hub, or to this computer."""
    source = run.prepared.model.source
    if machine.provider == HERE or source.kind == "hub":
        return
    for path in model_files(source):
        _send_once(run, machine, path, f"{_uploads(machine, source)}/{path.name}", source.revision)


def secrets(machine: Machine, prepared: Prepared) -> dict[str, str]:
    """Environment variables of a job on another machine: the hub's token, its address, and a folder for its files.

    They are sent over standard input into the job's environment, and written nowhere.
    """
    if machine.provider == HERE or prepared.model.source.kind != "hub":
        return {}
    from huggingface_hub import get_token

    token = get_token()
    found = {FOLDER_VARIABLE: f"{machine.shared}/{HUB}"} | ({"HF_TOKEN": token} if token else {})
    if endpoint := os.environ.get("HF_ENDPOINT"):
        found["HF_ENDPOINT"] = endpoint
    return found


def _for_machine(machine: Machine, prepared: Prepared) -> Prepared:
    """The study as another machine reads it: with the model's path there, and no path or host of this computer."""
    source = prepared.model.source
    if source.kind != "hub":
        place = _uploads(machine, source)
        path = f"{place}/{Path(source.path).name}" if source.kind == "gguf" else place
        source = source.model_copy(update={"path": path})
    kept = KEPT_OF_COMPUTE if machine.provider == "sky" else KEPT_OF_COMPUTE | KEPT_OF_GPUS
    compute = ComputeSpec(**prepared.spec.compute.model_dump(include=kept))
    name = {"model": prepared.spec.model.model_copy(update={"id": prepared.model.source.id})}
    text = {"corpus": prepared.spec.corpus.model_copy(update={"source": prepared.corpus.source})}
    spec = prepared.spec.model_copy(update={"compute": compute, "publish_to": None, **name, **text})
    return prepared.model_copy(update={"spec": spec, "model": prepared.model.model_copy(update={"source": source})})


def _uploads(machine: Machine, source: ModelSource) -> str:
    return f"{machine.shared}/{UPLOADS}/{source.key}"


def _send_once(run: StudyRun, machine: Machine, local: Path, remote: str, content: str) -> None:
    what = f"{remote} {content}"
    if not run.was_sent(machine, what):
        machine.upload(local, remote)
        run.note_sent(machine, what)
