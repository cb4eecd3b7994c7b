"""A study spread over machines: exactly what one machine gives, a lost part alone is redone, a cancel ends all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outliers.counting.shards import folder_of, is_here, parts_folder, write_record
from outliers.dispatch.run import start_step
from outliers.dispatch.shard import check_together
from outliers.errors import BadInput, PlanRefused
from outliers.files.atomic import held_bytes
from outliers.files.sealed import seal_folder
from outliers.jobs import jobs
from outliers.planning.offers import request_for
from outliers.publish.publish import model_slug
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.parts import Shard, captures_of_shards, shard_workspace, split
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.counting.test_counting import random_acts
from tests.support import synthetic, tiny
from tests.support.commands import run_command
from tests.support.runs import quiet_run

COMMAND = str(Path(sys.executable).with_name("outliers"))


def prepared_of(sequences, batch):
    acts, _ = random_acts(1, "bfloat16", sites=("attn_in",), shape=(1, 1, 4), width=8)
    made = synthetic.prepared_for(acts, "bfloat16")
    capture = made.spec.capture.model_copy(update={"batch_sequences": batch})
    spec = made.spec.model_copy(update={"capture": capture})
    return made.model_copy(update={"spec": spec, "corpus": made.corpus.model_copy(update={"num_sequences": sequences})})


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 64))
def test_parts_are_whole_batches_that_make_all_sequences(sequences, batch, shards):
    prepared, batches = prepared_of(sequences, batch), -(-sequences // batch)
    if shards > batches:
        with pytest.raises(BadInput, match=f"--shards {shards} is more than the {batches} batches.*at most {batches}"):
            split(prepared, shards)
        return
    parts = split(prepared, shards)
    assert [n for part in parts for n in range(part.first, part.stop)] == list(range(sequences))
    assert all(part.first % batch == 0 for part in parts)
    sizes = [-(-(part.stop - part.first) // batch) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert [(part.number, part.of) for part in parts] == [(n + 1, shards) for n in range(shards)]


def test_a_part_is_here_once_its_record_is(tmp_path):
    workspace, prepared, part = open_workspace(tmp_path), prepared_of(4, 1), Shard(1, 2, 0, 2)
    assert not is_here(part, prepared, workspace)
    folder_of(part, prepared, workspace).mkdir(parents=True)
    write_record(folder_of(part, prepared, workspace), {})
    assert not is_here(part, prepared, workspace)
    (folder_of(part, prepared, workspace) / "totals.npz").write_bytes(b"")
    assert not is_here(part, prepared, workspace)
    seal_folder(folder_of(part, prepared, workspace), ("totals.npz",))
    assert is_here(part, prepared, workspace)


def test_what_parts_hold_of_one_capture_is_not_what_they_hold_of_another(tmp_path):
    """Nor is a path one: `outliers captures rm` takes ids."""
    workspace = open_workspace(tmp_path)
    for machine, capture in (("outliers-a-1of2", "a"), ("outliers-a-2of2", "a"), ("lab-1of3", "b")):
        (shard_workspace(workspace, machine) / "captures" / capture).mkdir(parents=True)
    (tmp_path / "shards" / "notes.txt").write_text("")
    (tmp_path / "shards" / "empty").mkdir()
    held = {name: [part for part, _ in captures_of_shards(workspace, name)] for name in (None, "a", "b", "c", "..")}
    assert held == {None: ["1of3", "1of2", "2of2"], "a": ["1of2", "2of2"], "b": ["1of3"], "c": [], "..": []}


def test_parts_that_do_not_fit_together_are_refused_every_one(tmp_path):
    """Not the first alone: the others would run into the memory that is not there. Those that are done need none."""
    workspace, prepared = open_workspace(tmp_path), prepared_of(8, 1)
    needed = request_for(demand_of(prepared.spec, prepared.model), 0).needed_ram_bytes
    small, enough = quiet_run(prepared, workspace), quiet_run(prepared, workspace)
    for _ in range(3):
        with pytest.raises(
            PlanRefused, match=r"4 processes need .* GB of memory, .* GB is free: ask for fewer --shards"
        ):
            check_together(small, 4, 4 * needed - 1)
    check_together(enough, 4, 4 * needed)
    check_together(enough, 4, 0)  # what the first of them took is not missing
    for part in split(prepared, 4)[:2]:
        folder_of(part, prepared, workspace).mkdir(parents=True)
        write_record(folder_of(part, prepared, workspace), {})
        (folder_of(part, prepared, workspace) / "totals.npz").write_bytes(b"")
        seal_folder(folder_of(part, prepared, workspace), ("totals.npz",))
    check_together(quiet_run(prepared, workspace), 4, 2 * needed)


class Elsewhere:
    """A machine as far as a study is sent to one: it takes its time, and keeps what came."""

    provider, python, instance_id = "ssh", ("python",), "a disk"

    def __init__(self, name):
        self.name = name
        self.workspace = self.shared = f"/{name}"
        self.came = []

    def upload(self, local, remote):
        time.sleep(0.05)
        if local.is_file():
            self.came.append(json.loads(local.read_text())["model"]["source"]["path"])

    def start(self, job):
        return job.name


def test_parts_that_begin_at_once_are_each_told_their_own_machines_paths(tmp_path):
    """What is sent lies under one name of the study here."""
    workspace, prepared = open_workspace(tmp_path), prepared_of(4, 1)
    run = quiet_run(prepared, workspace)
    machines = [Elsewhere(f"host{number}") for number in range(6)]
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(lambda machine: start_step(run, machine, "analyze", "analyze-x"), machines))
    assert [machine.came for machine in machines] == [
        [f"/host{number}/uploads/{prepared.model.source.key}"] for number in range(6)
    ]


# The flow, by the real command and a real server.


@pytest.fixture(scope="module")
def world(tmp_path_factory, prefect_home):
    folder = tmp_path_factory.mktemp("spread")
    tiny.make_model(folder / "model", "Mixtral", dtype="bfloat16", num_hidden_layers=6)
    (folder / "book.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 900)
    return folder, prefect_home.environment


def arguments(folder, *more):
    corpus = ("--corpus", str(folder / "book.txt"), "--num-sequences", "7", "--sequence-length", "96")
    return [COMMAND, "study", "--model", str(folder / "model"), *corpus, "--json", *more]


def run(world, workspace, *more, **variables):
    folder, environment = world
    words = arguments(folder, "--workspace", str(workspace), *more)[1:]
    return run_command(folder, *words, environment=environment | variables)


def prepared_in(world, workspace):
    """The study with OPTIONS, as the command prepares it."""
    corpus = {"source": str(world[0] / "book.txt"), "num_sequences": 7, "sequence_length": 96}
    capture = {"batch_sequences": 2, "sites": ["attn_in", "mlp_in", "resid"], "perplexity": True}
    spec = StudySpec.model_validate({"model": str(world[0] / "model"), "corpus": corpus, "capture": capture})
    return prepare(spec, workspace)


def attempts(workspace):
    """Every job that the parts here have had, and how often: `extract 1of3` -> 1."""
    found = workspace.root.glob("shards/*/jobs/*/[0-9]*")
    return dict(Counter(f"{path.parts[-2].partition('-')[0]} {path.parts[-4].rpartition('-')[2]}" for path in found))


def manifest(done):
    assert done.returncode == 0, done.stderr
    return json.loads((Path(json.loads(done.stdout)["results"]) / "manifest.json").read_text())


EACH_ONCE = {f"{verb} {part}": 1 for verb in ("extract", "analyze") for part in ("1of3", "2of3", "3of3")}
OPTIONS = ("--batch-sequences", "2", "--sites", "attn_in,mlp_in,resid", "--perplexity")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The manifest of the study on one machine."""
    return manifest(run(world, tmp_path_factory.mktemp("one"), *OPTIONS))


@pytest.mark.servers
@pytest.mark.studies
def test_three_processes_give_what_one_gives(world, whole, tmp_path):
    spread = manifest(run(world, tmp_path / "three", *OPTIONS, "--shards", "3"))
    assert spread["results_digest"] == whole["results_digest"]
    assert spread["study_id"] == whole["study_id"]
    parts = spread["provenance"]["parts"]
    assert [part["sequences"] for part in parts] == ["0:2", "2:4", "4:7"]
    assert [part["extraction"]["sequences"] for part in parts] == [2, 2, 3]
    # no part's summary is left, and no activations are where the whole is
    assert not (tmp_path / "three" / "parts").exists() or not any((tmp_path / "three" / "parts").iterdir())
    assert not list((tmp_path / "three" / "captures").glob("*/activations.zarr"))


@pytest.mark.servers
@pytest.mark.studies
def test_three_processes_measure_formats_as_one_does(world, tmp_path):
    """In rounds: counts, ranges, errors; each job once."""
    options = (*OPTIONS, "--formats", "int8_tensor,nvfp4", "--format-tokens", "300")
    whole = run(world, tmp_path / "one", *options)
    spread = run(world, tmp_path / "three", *options, "--shards", "3")
    made = manifest(spread)
    assert made["results_digest"] == manifest(whole)["results_digest"]
    tables = [Path(json.loads(one.stdout)["results"]) / "quantization.parquet" for one in (whole, spread)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    rounds = {f"formats {part}": 2 for part in ("1of3", "2of3", "3of3")}
    assert attempts(open_workspace(tmp_path / "three")) == EACH_ONCE | rounds
    assert all(part["formats"]["seconds"] >= 0 for part in made["provenance"]["parts"])
    assert not any((tmp_path / "three" / "parts").iterdir())


def captures(world, workspace, *more):
    _, environment = world
    return run_command(workspace, "captures", *more, "--workspace", workspace, environment=environment)


@pytest.mark.servers
@pytest.mark.long
def test_what_the_parts_hold_is_told_listed_and_removed(world, tmp_path):
    """The activations are in the parts' own workspaces: nothing else frees them."""
    outcome = json.loads(run(world, tmp_path / "ws", "--shards", "2").stdout)
    name, workspace = outcome["capture_id"], open_workspace(tmp_path / "ws")
    folders = [path for path in tmp_path.glob(f"ws/**/captures/{name}") if path.is_dir()]
    assert len(folders) == 3
    assert outcome["capture_bytes"] == sum(held_bytes(folder) for folder in folders)
    listed = json.loads(captures(world, workspace.root, "list", "--json").stdout)["captures"]
    assert [(item["capture_id"], item["part"], item["done"]) for item in listed] == [
        (name, None, 0),
        (name, "1of2", 3),
        (name, "2of2", 4),
    ]
    assert f"{name} part 2of2" in captures(world, workspace.root, "list").stdout
    removed = json.loads(captures(world, workspace.root, "rm", name, "--json").stdout)["removed"]
    assert removed == {name: outcome["capture_bytes"]}
    assert not [folder for folder in folders if folder.exists()]
    again = captures(world, workspace.root, "rm", name)
    assert (again.returncode, f"there is no capture {name}" in again.stderr) == (2, True)


@pytest.mark.servers
@pytest.mark.long
def test_a_lost_part_is_redone_alone(world, whole, tmp_path):
    """The second part's folder can't be written at first, the others are done; then the same command again, for which
    Prefect remembers nothing: its results are stored elsewhere."""
    workspace = open_workspace(tmp_path / "work")
    prepared = prepared_in(world, workspace)
    name = f"outliers-{prepared.capture_id}-2of3"
    (workspace.root / "shards").mkdir()
    (workspace.root / "shards" / name).write_text("in the way")
    failed = run(world, workspace.root, *OPTIONS, "--shards", "3")
    assert failed.returncode in (1, 2), failed.stderr
    assert name in failed.stderr
    here = [is_here(part, prepared, workspace) for part in split(prepared, 3)]
    assert here == [True, False, True]
    (workspace.root / "shards" / name).unlink()
    done = run(world, workspace.root, *OPTIONS, "--shards", "3", PREFECT_HOME=str(tmp_path / "elsewhere"))
    made = manifest(done)
    assert made["results_digest"] == whole["results_digest"]
    assert attempts(workspace) == EACH_ONCE
    assert [part["extraction"]["sequences"] for part in made["provenance"]["parts"]] == [2, 2, 3]
    assert not parts_folder(prepared, workspace).exists()


@pytest.mark.servers
@pytest.mark.long
def test_two_runs_at_once_share_what_is_done(world, whole, tmp_path):
    """One makes a part and the other waits for it; one joins them, and both answer with that."""
    folder, environment = world
    workspace = open_workspace(tmp_path / "work")
    words = arguments(folder, "--workspace", str(workspace.root), *OPTIONS, "--shards", "3")
    runs = []
    for name in ("one", "other"):
        with (tmp_path / name).open("wb") as out, (tmp_path / f"{name}.err").open("wb") as err:
            runs.append((subprocess.Popen(words, env=environment, stdout=out, stderr=err), name))
    for process, name in runs:
        assert process.wait(240) == 0, (tmp_path / f"{name}.err").read_text(errors="replace")
        found = json.loads((tmp_path / name).read_text())
        made = json.loads((Path(found["results"]) / "manifest.json").read_text())
        assert made["results_digest"] == whole["results_digest"]
        assert [part["extraction"]["sequences"] for part in made["provenance"]["parts"]] == [2, 2, 3]
    assert attempts(workspace) == EACH_ONCE
    assert not any((workspace.root / "parts").iterdir())
    assert not any((workspace.root / "locks").iterdir())


@pytest.mark.servers
@pytest.mark.long
def test_what_could_not_be_published_is_not_made_again(world, whole, tmp_path):
    """The parts are joined, and the store refuses; then it takes the study, and no part is asked for again."""
    workspace, atlas = open_workspace(tmp_path / "work"), tmp_path / "atlas"
    prepared = prepared_in(world, workspace)
    atlas.mkdir()
    in_the_way = atlas / model_slug(prepared.model.source.id)
    in_the_way.write_text("")
    words = (*OPTIONS, "--shards", "3", "--publish-to", f"file://{atlas}")
    refused = run(world, workspace.root, *words)
    assert (refused.returncode, "could not write" in refused.stderr) == (2, True), refused.stderr
    assert attempts(workspace) == EACH_ONCE
    in_the_way.unlink()
    made = manifest(run(world, workspace.root, *words, PREFECT_HOME=str(tmp_path / "elsewhere")))
    assert made["results_digest"] == whole["results_digest"]
    assert [part["extraction"]["sequences"] for part in made["provenance"]["parts"]] == [2, 2, 3]
    # what is published is rendered with public names: its pages, and so its folder, are others than the owner's
    there = json.loads((in_the_way / prepared.study_id / "manifest.json").read_text())
    numbers = [
        {file["path"]: file["sha256"] for file in one["files"] if not file["path"].endswith((".html", ".png"))}
        for one in (there, made)
    ]
    assert numbers[0] == numbers[1]
    same = ("study_id", "results_digest", "headline", "spec", "provenance")
    assert {name: there[name] for name in same} == {name: made[name] for name in same}
    assert attempts(workspace) == EACH_ONCE
    assert not parts_folder(prepared, workspace).exists()


@pytest.mark.servers
@pytest.mark.studies
def test_a_cancel_ends_every_part(world, tmp_path):
    folder, environment = world
    options = ("--workspace", str(tmp_path / "work"), "--shards", "2", "--num-sequences", "300")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(arguments(folder, *options), env=environment, stdout=log, stderr=log)
    spaces: list[Path] = []
    deadline = time.monotonic() + 120
    while len(spaces) < 2 and time.monotonic() < deadline and process.poll() is None:
        spaces = [
            path.parents[2] for path in tmp_path.glob("work/shards/*/captures/*/journal.jsonl") if path.stat().st_size
        ]
        time.sleep(0.05)
    assert len(spaces) == 2, (tmp_path / "log").read_text(errors="replace")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "log").read_text(errors="replace")
    assert [jobs.running(space) for space in spaces] == [(), ()]


@pytest.mark.servers
@pytest.mark.studies
def test_more_parts_than_batches_is_refused_before_anything_runs(world, tmp_path):
    done = run(world, tmp_path / "work", "--shards", "8")
    assert done.returncode == 2
    assert "--shards 8 is more than the 7 batches" in done.stderr
    assert not (tmp_path / "work" / "shards").exists()
