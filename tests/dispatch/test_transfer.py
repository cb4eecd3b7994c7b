"""What of a study crosses to another machine, and what of this side does not: no price, path or host, no token unasked."""

from __future__ import annotations

import json

import pytest

from outliers.dispatch.transfer import secrets, send_study
from outliers.study.prepare import read_prepared
from outliers.workspace import open_workspace
from tests.counting.test_counting import random_acts
from tests.support import synthetic
from tests.support.runs import quiet_run

COMPUTE = {
    "provider": "sky",
    "gpu_count": 2,
    "processes": 1,
    "gpu_filter": "A100-80GB",
    "min_vram": 80,
    "min_cpu_ram": 100,
    "max_price": 7.5,
    "host": None,
    "executor": "threads=3",
    "lease_seconds": 777,
}


class Away:
    """A machine as far as sending looks at one; `files`: what has come, by its place there."""

    name, instance_id, workspace, shared = "m", "disk-1", "/there/machines/m", "/there"

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.sent: list[str] = []
        self.files: dict[str, str] = {}

    def upload(self, local, remote):
        self.sent.append(remote)
        if local.is_file():
            self.files[remote] = local.read_text()


@pytest.fixture
def prepared():
    acts, _ = random_acts(1, "bfloat16", sites=("attn_in",), shape=(1, 1, 4), width=8)
    made = synthetic.prepared_for(acts, "bfloat16")
    spec = made.spec.model_copy(update={"compute": made.spec.compute.model_copy(update=COMPUTE)})
    return made.model_copy(update={"spec": spec})


def of_hub(prepared, kind):
    source = prepared.model.source.model_copy(update={"kind": kind})
    return prepared.model_copy(update={"model": prepared.model.model_copy(update={"source": source})})


@pytest.mark.parametrize("provider", ["sky", "ssh"])
def test_a_machine_is_told_what_it_needs_alone(prepared, provider, tmp_path):
    """Which of its GPUs are used is a host's business; a rented machine was rented for them by a catalog's name."""
    machine = Away(provider)
    place = send_study(quiet_run(prepared, open_workspace(tmp_path)), machine)
    assert place == f"/there/machines/m/studies/{prepared.study_id}.json"
    (tmp_path / "told.json").write_text(machine.files[f"studies/{prepared.study_id}.json"])
    told = read_prepared(tmp_path / "told.json", open_workspace(tmp_path))
    kept = {"gpu_count": 2, "processes": 1, "executor": "threads=3"}
    kept |= {"gpu_filter": "A100-80GB", "min_vram": 80.0} if provider == "ssh" else {}
    assert told.spec.compute.model_dump(exclude_defaults=True) == kept
    assert told.spec.publish_to is None
    assert str(tmp_path) not in json.dumps(machine.files)
    assert (told.study_id, told.capture_id) == (prepared.study_id, prepared.capture_id)


def test_what_was_sent_is_sent_once_to_a_disk_until_it_may_be_gone(prepared, tmp_path):
    machine, run = Away("ssh"), quiet_run(prepared, open_workspace(tmp_path))
    send_study(run, machine)
    first = list(machine.sent)
    assert first == [f"studies/{prepared.study_id}.json", f"corpora/{prepared.corpus.key}"]
    send_study(run, machine)
    assert machine.sent == first
    other = Away("ssh")
    other.instance_id = "another-disk"
    run.forget_sent(other)
    send_study(run, machine)
    assert machine.sent == first
    run.forget_sent(machine)
    send_study(run, machine)
    assert machine.sent == first * 2
    send_study(quiet_run(prepared, open_workspace(tmp_path)), machine)
    assert machine.sent == first * 3, "another run has not sent it"


@pytest.mark.parametrize(
    ("provider", "kind", "told"), [("ssh", "hub", True), ("ssh", "folder", False), ("local", "hub", False)]
)
def test_the_token_goes_only_where_a_model_is_downloaded(prepared, monkeypatch, provider, kind, told):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    found = secrets(Away(provider), of_hub(prepared, kind))
    known = {"HF_TOKEN": "hf_canary", "HF_ENDPOINT": "https://hub.example", "OUTLIERS_HUB_FOLDER": "/there/hub"}
    assert found == (known if told else {})
