"""`containers/`: what can be read without a container engine. `make test-containers` asks the programs that read it."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "containers"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
POOL = json.loads((FOLDER / "kubernetes-pool.json").read_text())
DEPLOYMENTS = yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_has_a_pinned_base_another_user_than_root_and_a_health_check(path):
    text = path.read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}$", text, re.M)
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${PYTHON_IMAGE}"}
    final = text.rpartition("\nFROM ")[2]
    assert final.index("\nUSER 10001:10001\n") < final.index("\nENTRYPOINT ")
    assert "\nHEALTHCHECK " in final
    for line in re.findall(r"pip install.*|apt-get install.*", text):
        assert "--no-cache" not in line, "a cache is mounted"
    assert not re.search(r"^(ARG|ENV).*(PASSWORD|SECRET|API_KEY|AUTH)", text, re.M | re.I)


def test_an_image_is_given_the_packages_of_the_project_and_nothing_that_is_not_needed():
    let_through = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.M))
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} < let_through
    assert (ROOT / ".dockerignore").read_text().count("\n*\n") == 1, "all else is left out"
    for path in DOCKERFILES:
        copied = {
            word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", path.read_text(), re.M) for word in line.split()
        }
        assert copied == let_through, path.name


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["name"])
def test_a_deployment_names_a_flow_of_ours_and_variables_that_its_pool_has(deployment):
    module, _, name = deployment["entrypoint"].rpartition(".")
    assert getattr(import_module(module), name).name == name
    variables = deployment["work_pool"]["job_variables"]
    assert re.fullmatch(r"outliers-(control|gpu):0\.1\.0", variables["image"])
    if deployment["work_pool"]["name"] == "outliers-kubernetes":
        assert variables.keys() <= POOL["variables"]["properties"].keys()
    if "deployment" in deployment.get("parameters", {}):
        assert deployment["parameters"]["deployment"] in {f"study/{one['name']}" for one in DEPLOYMENTS}


def test_every_placeholder_of_the_pods_template_is_a_variable():
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(POOL["job_configuration"])))
    assert used == POOL["variables"]["properties"].keys()
