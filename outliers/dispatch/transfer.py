"""What of a study crosses to another machine: its spec and its token ids, a token for the hub, and a model only if asked.

Kilobytes, unless --upload-model sends weights that are on this machine alone. On this computer nothing crosses: the
steps read the same workspace. Before it: the tasks. After it: a machine's `upload`, and the steps there.
"""

from __future__ import annotations

import os
from pathlib import Path

from outliers.errors import PlanRefused
from outliers.files.sealed import write_sealed
from outliers.hub.cache import FOLDER_VARIABLE
from outliers.machines.base import Machine
from outliers.machines.lease import HUB, UPLOADS
from outliers.model.source import ModelSource
from outliers.spec import DEFAULT_PROVIDER, ComputeSpec, chosen
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

HERE = DEFAULT_PROVIDER
KEPT_OF_COMPUTE = {"gpu_count", "executor"}
"""What a machine is told of how it was chosen. No price, host or folder of this side."""
KEPT_OF_GPUS = {"gpu_filter", "min_vram"}
"""And which of its GPUs are used: not where the whole machine was rented for them, by a catalog's name for its GPUs, which
is not the driver's."""

_SENT: set[tuple[str, str, str]] = set()
"""(machine, its disk, what): sent by this process already, so not asked about for every step."""


def check_travels(prepared: Prepared) -> None:
    """PlanRefused where the study's machine is another one and its model is here, unless it may be sent."""
    compute, source = prepared.spec.compute, prepared.model.source
    if chosen(compute.provider) == HERE or source.kind == "hub" or compute.upload_model:
        return
    raise PlanRefused(
        f"{source.name} is on this machine, not on the hub, and {compute.provider or 'the provider'} would need its "
        f"{model_bytes(source) / 1e6:,.0f} MB: --upload-model sends it (once for a machine)"
    )


def model_bytes(source: ModelSource) -> int:
    """Bytes of the files that are sent for a model that is here."""
    return sum(path.stat().st_size for path in model_files(source))


def model_files(source: ModelSource) -> tuple[Path, ...]:
    """The files of a model that is here: of a folder only what its revision is the hash of."""
    from outliers.model.folder import model_files

    place = Path(source.path)
    return (place,) if place.is_file() else model_files(place)


def send_study(machine: Machine, prepared: Prepared, workspace: Workspace) -> str:
    """Put the study on a machine as the file that every step reads; returns its path there."""
    place = f"studies/{prepared.study_id}.json"
    away = machine.provider != HERE
    content = _for_machine(machine, prepared) if away else prepared
    local = workspace.root / ("sent" if away else "studies") / f"{prepared.study_id}.json"
    local.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(local, content.model_dump(mode="json"))
    _once(machine, local, place, content.model_dump_json())
    if away:
        corpus = f"corpora/{prepared.corpus.key}"
        _once(machine, workspace.root / corpus, corpus, prepared.corpus.key)
    return f"{machine.workspace}/{place}"


def send_model(machine: Machine, prepared: Prepared) -> None:
    """Send the files of a model that is here alone; nothing for a model of the hub, or on this computer."""
    source = prepared.model.source
    if machine.provider == HERE or source.kind == "hub":
        return
    for path in model_files(source):
        _once(machine, path, f"{_uploads(machine, source)}/{path.name}", source.revision)


def secrets(machine: Machine, prepared: Prepared) -> dict[str, str]:
    """What a job on another machine is told by its environment: who we are to the hub, where the hub is, and a place for its
    files beside ours.

    It crosses over standard input into the job's environment, and is written nowhere.
    """
    if machine.provider == HERE or prepared.model.source.kind != "hub":
        return {}
    from huggingface_hub import get_token

    token = get_token()
    found = {FOLDER_VARIABLE: f"{machine.shared}/{HUB}"} | ({"HF_TOKEN": token} if token else {})
    if endpoint := os.environ.get("HF_ENDPOINT"):
        found["HF_ENDPOINT"] = endpoint
    return found


def forget_sent(machine: Machine) -> None:
    """What was sent to a machine is looked for there again: a lease that ended may have taken it along."""
    _SENT.difference_update({mark for mark in _SENT if mark[:2] == (machine.name, machine.instance_id)})


def _for_machine(machine: Machine, prepared: Prepared) -> Prepared:
    """The study as another machine reads it: the model where it is there, and nothing of this side's paths and hosts."""
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


def _once(machine: Machine, local: Path, remote: str, what: str) -> None:
    mark = (machine.name, machine.instance_id, f"{remote} {what}")
    if mark not in _SENT:
        machine.upload(local, remote)
        _SENT.add(mark)
