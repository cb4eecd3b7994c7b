"""Keys of cached results are made of ids: what a study's run holds neither enters them nor is walked through by Prefect."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prefect.utilities.collections import visit_collection

from outliers.spec import digest
from outliers.study.parts import Shard
from outliers.workspace import open_workspace
from tasks import policies
from tasks.analyze import analyze
from tasks.extract import extract
from tasks.provision import provision
from tasks.shard import merge, shard
from tasks.sync import sync
from tests.support.runs import quiet_run
from tests.tasks.test_shards import prepared_of


@pytest.fixture
def run(tmp_path):
    return quiet_run(prepared_of(4, 1), open_workspace(tmp_path))


def test_the_keys_of_a_study_are_those_of_its_ids(run, tmp_path):
    study, capture, place = run.prepared.study_id, run.prepared.capture_id, digest(str(tmp_path))[:12]
    parameters = {"run": run, "machine": SimpleNamespace(instance_id="disk"), "part": Shard(2, 3, 1, 3)}
    keys = {task.name: task.cache_key_fn(None, parameters) for task in (extract, analyze, shard, merge, sync)}
    assert keys == {
        "extract": f"extract-{capture}-disk",
        "analyze": f"analyze-{study}-disk-{place}",
        "shard": f"shard-{study}-1-3-{place}",
        "merge": f"merge-{study}-{place}",
        "sync": f"sync-{study}-{digest(run.prepared.spec.publish_to)[:12]}",
    }
    assert not provision.persist_result
    assert extract.cache_key_fn is policies.extract_key


def test_another_run_of_the_study_has_the_same_keys(run):
    other = quiet_run(run.prepared, run.workspace, "another run")
    other.cancel()
    keys = [policies.merge_key(None, {"run": each}) for each in (run, other)]
    assert keys[0] == keys[1]


def test_a_run_is_handed_to_a_task_as_it_is(run):
    """Prefect copies models and dataclasses among parameters, and looks for futures in them."""
    seen = []

    def visit(found):
        seen.append(found)
        return found

    assert visit_collection({"run": run}, visit, return_data=True)["run"] is run
    assert run in seen and run.prepared not in seen
