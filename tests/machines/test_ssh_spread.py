"""A study spread over two hosts, by the real command: what one machine gives; and what is home needs no host any more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from outliers.publish.publish import model_slug
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support.remote import Sshd, needs_sshd
from tests.support.ssh_studies import SESSION, Control, attempts, gone, ours, world

__all__ = ["world"]  # fixtures, found by name

pytestmark = [pytest.mark.servers, needs_sshd]

SEQUENCES = 100
FLOW = "import json, sys; from flows.study import study; print(json.dumps(study(**json.loads(sys.argv[1]))))"


@pytest.fixture(scope="module")
def here(world, tmp_path_factory):
    """The digest of the study that all tests run, made in one process."""
    return world.digest(tmp_path_factory.mktemp("here"), SEQUENCES)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Two hosts."""
    folder = tmp_path_factory.mktemp("lab")
    with Sshd(folder / "a", "a", environment=SESSION) as a, Sshd(folder / "b", "b", environment=SESSION) as b:
        yield a, b


@pytest.fixture
def control(tmp_path, lab, world):
    config = tmp_path / "config"
    config.write_text("".join(host.config.read_text() for host in lab))
    environment = {"OUTLIERS_SSH_CONFIG": str(config), "OUTLIERS_PATIENCE_SECONDS": "2"}
    with Control(tmp_path / "control", None, world.prefect, **environment) as side:
        for host in lab:
            added = side.run("machines", "add", host.alias, host.alias, "--python", sys.executable)
            assert added.wait() == 0, added.said
        yield side


def words(world, *more):
    place = ("--provider", "ssh", "--upload-model", "--lease-seconds", "60", "--grace", "600", "--json")
    return world.study(SEQUENCES, *place, *more)


def machines(host):
    """The names of the machines that a host has had, and still has the files of."""
    return sorted(path.name for path in (host.home / ".outliers" / "machines").iterdir())


@pytest.mark.long
def test_two_hosts_give_what_one_machine_gives_and_only_summaries_come_home(world, lab, control, here):
    outcome = control.start(*words(world, "--shards", "2")).answer()
    made = control.manifest(outcome["study_id"])
    assert made["results_digest"] == here
    name = f"outliers-{outcome['capture_id']}"
    # a host each, whichever came first
    assert sorted(machines(host) for host in lab) == [[f"{name}-1of2"], [f"{name}-2of2"]]
    for host in lab:
        (machine,) = machines(host)
        assert [len(attempts(host, verb, machine)) for verb in ("extract", "analyze", "report")] == [1, 1, 0]
    parts = made["provenance"]["parts"]
    assert [part["sequences"] for part in parts] == ["0:50", "50:100"]
    # 2 MB of summary each, however long the part is
    for host in lab:
        assert sum(path.stat().st_size for path in host.home.rglob("activations.zarr/**/c.*")) > 9_000_000
    assert [0 < part["machine"]["received_bytes"] < 3_000_000 for part in parts] == [True, True]
    assert not list(control.workspace.rglob("activations.zarr"))
    assert not any((control.workspace / "parts").iterdir())
    assert control.records() == []
    assert [gone(host, seconds=10) for host in lab] == [True, True], [ours(host) for host in lab]


@pytest.mark.long
def test_results_that_are_home_are_published_without_their_host(tmp_path, world, lab, control, here):
    """The store refuses: the machine is given back all the same; then its host is away, and is not asked."""
    host, atlas = lab[0], tmp_path / "atlas"
    asked = words(world, "--host", host.alias, "--machine", "lone", "--publish-to", f"file://{atlas}")
    spec = json.loads(control.run(*asked, "--print-spec").out.read_text())
    prepared = prepare(StudySpec.model_validate(spec), open_workspace(tmp_path / "elsewhere"))
    atlas.mkdir()
    in_the_way = atlas / model_slug(prepared.model.source.id)
    in_the_way.write_text("")
    refused = control.run(*asked)
    assert (refused.wait(), "could not write" in refused.said) == (2, True), refused.said
    assert control.manifest(prepared.study_id)["results_digest"] == here
    assert control.records() == []
    assert gone(host, "lone", 10), ours(host, "lone")
    in_the_way.unlink()
    host.stop()
    try:
        environment = control.environment | {"PREFECT_HOME": str(tmp_path / "no memory")}
        done = subprocess.run(
            [sys.executable, "-c", FLOW, json.dumps(spec)],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    finally:
        host.start()
    assert done.returncode == 0, done.stderr
    published = json.loads((in_the_way / prepared.study_id / "manifest.json").read_text())
    assert published["results_digest"] == here
    assert published["provenance"]["machine"]["provider"] == "ssh"
    assert [len(attempts(host, verb, "lone")) for verb in ("extract", "analyze", "report")] == [1, 1, 1]
