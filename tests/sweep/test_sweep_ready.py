"""`outliers sweep --dry-run` as a person meets it: with a hub and catalogs, without a hub, without the models."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outliers.sweep.sweep import read_sweep
from tests.support.hub_server import client_environment, hub_server
from tests.support.sweep_hub import repo_of, write_home

ROOT = Path(__file__).resolve().parents[2]
RENTED = ("moe", "qwen3-dense")
MODELS = {
    name: [study.spec.model.id for study in read_sweep(ROOT / "sweeps" / f"{name}.toml").studies] for name in RENTED
}
OUTLIERS = str(Path(sys.executable).with_name("outliers"))


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The plan of each rented ready-made sweep, by its name, and what the command said meanwhile."""
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: pip install -e '.[sky]'")
    home = tmp_path_factory.mktemp("home")
    write_home(home)
    with hub_server(*map(repo_of, itertools.chain(*MODELS.values()))) as hub:
        more = {"HOME": str(home), "PYTHONPATH": str(ROOT), "OUTLIERS_WORKSPACE": str(home / "ws")}
        files = [str(ROOT / "sweeps" / f"{name}.toml") for name in RENTED]
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.sweep_hub", *files],
            env=client_environment(hub.url, home / "hf", **more),
            cwd=home,
            capture_output=True,
            text=True,
            check=True,
        )
        fetched = {asked.path.rsplit("/", 1)[-1] for asked in hub.requests("^GET .*/resolve/")}
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {plan["name"]: plan for plan in made}, done.stderr, fetched


@pytest.mark.parametrize("name", RENTED)
@pytest.mark.studies
def test_a_ready_made_sweep_has_plan_price_and_time_for_each_study(plans, name):
    plan = plans[0][name]
    assert [study["model"] for study in plan["studies"]] == MODELS[name]
    limit = {study.spec.model.id: study.spec.compute for study in read_sweep(ROOT / "sweeps" / f"{name}.toml").studies}
    for study in plan["studies"]:
        asked, offer = limit[study["model"]], study["plan"]["offers"][0]
        assert study["refused"] is None, study["name"]
        assert 0 < study["price"] <= asked.max_total_price
        assert study["seconds"] > 300, "a machine boots for so long alone"
        assert study["machine"] == offer["name"]
        assert len(offer["gpus"]) >= asked.gpu_count
        assert all(gpu["total_bytes"] >= asked.min_vram * 1e9 for gpu in offer["gpus"])
    assert plan["price"] == pytest.approx(sum(study["price"] for study in plan["studies"]), abs=1e-3)
    assert (plan["refusals"], plan["unpriced"], plan["remedy"]) == ([], [], None)


@pytest.mark.studies
def test_each_model_is_told_as_it_is_planned_and_no_weights_are_fetched(plans):
    _, said, fetched = plans
    for name in RENTED:
        for number, model in enumerate(MODELS[name], 1):
            assert f"  planning {model.split('/')[1]} ({number} of {len(MODELS[name])})\n" in said
    # of the weights the first bytes alone, where a config names no dtype
    assert fetched <= {"config.json", "model.safetensors"}


def dry_run(folder, file, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "OUTLIERS_"))}
    return subprocess.run(
        [OUTLIERS, "sweep", str(file), "--dry-run"],
        env=kept | {"OUTLIERS_WORKSPACE": str(folder / "ws"), "HF_HOME": str(folder / "hf"), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_that_can_not_be_reached_is_waited_for_once(tmp_path):
    done = dry_run(tmp_path, ROOT / "sweeps" / "moe.toml", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    first, *others = [name.split("/")[1] for name in MODELS["moe"]]
    waits = [line for line in done.stderr.splitlines() if "trying again in" in line]
    assert len(waits) == 2
    assert all(f"for GET /api/models/{MODELS['moe'][0]}" in line for line in waits)
    refused = [line for line in done.stderr.splitlines() if line.startswith("refused ")]
    assert len(refused) == 2
    assert refused[0].split()[1] == f"{first}:"
    assert (
        f" {', '.join(others)}: 'MODEL' is not a folder, a file or a built-in, and the hub, which did not" in refused[1]
    )


def test_what_is_refused_of_all_is_said_once_with_their_names(tmp_path):
    done = dry_run(tmp_path, ROOT / "sweeps" / "moe.toml", HF_HUB_OFFLINE="1")
    (refused,) = [line for line in done.stderr.splitlines() if line.startswith("refused ")]
    names = ", ".join(name.split("/")[1] for name in MODELS["moe"])
    assert (
        f" {names}: 'MODEL' is not a folder, a file or a built-in, and the hub is switched off (HF_HUB_OFFLINE)"
        in refused
    )


def test_models_that_are_made_by_a_command_are_asked_for_by_it(tmp_path):
    """The offline sweep in a fresh checkout. The built-in model, which takes its time, is one that is not there either."""
    text = (ROOT / "sweeps" / "offline.toml").read_text()
    (tmp_path / "offline.toml").write_text(text.replace("builtin:smollm2", "./offline-models/none"))
    done = dry_run(tmp_path, "offline.toml", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    names = "none-float32, none-bfloat16, smollm2-moe, tiny-qwen3-moe, tiny-gpt-oss"
    lines = done.stderr.splitlines()
    assert f"refused     {names}: there is no model at MODEL: not a folder, not a .gguf file" in lines
    assert f"first       make offline-models, in the checkout (for {names})" in lines
