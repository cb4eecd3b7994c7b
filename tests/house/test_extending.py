"""docs/extending.md, followed: its code is taken from the page, and does what the page says."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.errors import PlanRefused, UnknownArchitecture
from outliers.jobs.jobs import JobSpec
from outliers.machines import providers
from outliers.machines.base import MachineRequest
from outliers.machines.providers import provider
from outliers.model import families as architectures
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from tests.model.test_architectures import SITES, independent
from tests.support import tiny
from tests.support.captured import stored
from tests.support.remote import Sshd, needs_sshd
from tests.support.synthetic import Silent

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
BLOCKS = [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)]
ROW, CONFIG, MODULE, LINE = BLOCKS


def test_an_architecture_is_added_by_one_row(tmp_path, workspace, text, monkeypatch):
    monkeypatch.setattr(tiny, "CONFIGS", dict(tiny.CONFIGS))
    exec(CONFIG, {"CONFIGS": tiny.CONFIGS, "COMMON": tiny.COMMON})
    folder = tiny.make_model(tmp_path / "model", "Cohere", dtype="bfloat16")
    spec = StudySpec.model_validate(tiny.spec_for(folder, text, sequences=2, capture={"sites": (*SITES, "down_in")}))
    with pytest.raises(UnknownArchitecture, match="CohereForCausalLM"):
        prepare(spec, workspace)
    monkeypatch.setattr(architectures, "FAMILIES", dict(architectures.FAMILIES))
    exec(ROW, {"FAMILIES": architectures.FAMILIES, "Family": architectures.Family})
    study = prepare(spec, workspace)
    extract(study, workspace, Silent())
    ids = torch.from_numpy(load_corpus(study.corpus, workspace).token_ids.astype(np.int64))
    tensors, _ = independent(load_model(study.model, workspace, "cpu"), ids, step=1)
    for site, tensor in tensors.items():
        np.testing.assert_array_equal(stored(workspace, study, site), tensor.float().numpy(), err_msg=site)


@needs_sshd
@pytest.mark.servers
def test_a_provider_is_a_module_and_a_line(tmp_path, monkeypatch):
    made: dict = {"HOSTS": ("lab1", "lab2"), "PYTHON": sys.executable}
    exec(MODULE, made)
    monkeypatch.setattr(providers, "PROVIDERS", dict(providers.PROVIDERS))
    exec(LINE, made | {"PROVIDERS": providers.PROVIDERS})
    with Sshd(tmp_path / "a", "lab1") as one, Sshd(tmp_path / "b", "lab2") as two:
        config = tmp_path / "config"
        config.write_text(one.config.read_text() + two.config.read_text())
        monkeypatch.setenv("OUTLIERS_SSH_CONFIG", str(config))
        pool = provider("pool", tmp_path / "ws")
        first = pool.ensure("first", MachineRequest(lease_seconds=60), "run 1", "a study")
        second = pool.ensure("second", MachineRequest(lease_seconds=60), "run 2", "another")
        assert {rental.place for rental in pool.list()} == {"lab1", "lab2"}
        with pytest.raises(PlanRefused, match=r"no host is free: lab1: it is held; lab2: it is held"):
            pool.ensure("third", MachineRequest(), "run 3", "a third")
        # a retry finds its own
        again = provider("pool", tmp_path / "ws").ensure("first", MachineRequest(lease_seconds=60), "run 1", "a study")
        assert again.instance_id == first.instance_id != second.instance_id
        handle = first.start(JobSpec("hello", ("sh", "-c", "echo from the pool")))
        assert "from the pool" in [event.message for event in first.follow(handle)]
        pool.hold("second", "run 2", "another", 90)
        assert pool.leave("first", "run 1") == "first is free"
        assert pool.release("second") == "second is free"
        assert pool.release("second") == "second is not held"
        assert pool.list() == ()
