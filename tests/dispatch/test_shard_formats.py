"""Shards of a study with formats wait for each other, round by round, and go on where a run was ended; each beside a machine
whose step runs here."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outliers.counting.analyze import analyze
from outliers.counting.merge import merge_summaries
from outliers.counting.shards import draft_of, folder_of, is_counted_here, is_here, place_shard, write_record
from outliers.dispatch.shard_formats import ShardAtWork, join_shard_formats, measure_shard
from outliers.dispatch.study_run import StudyCancelled
from outliers.errors import JobFailed, SummaryMismatch
from outliers.publish.reporting import write_study
from outliers.steps import run_formats
from outliers.study.parts import split
from outliers.workspace import open_workspace
from tests.support import synthetic
from tests.support.format_parts import World, errors_of
from tests.support.runs import quiet_run


class Here:
    """A machine whose workspace is a folder, as far as a shard asks for one."""

    name = "here"

    def __init__(self, workspace):
        self.root, self.workspace = workspace.root, str(workspace.root)

    def upload(self, local, remote):
        shutil.copytree(local, self.root / remote, dirs_exist_ok=True)

    def download(self, remote, local, *, max_bytes, max_files, names):
        local.mkdir(parents=True)
        for name in names:
            shutil.copyfile(self.root / remote / name, local / name)
        assert len(names) <= max_files and sum(path.stat().st_size for path in local.iterdir()) <= max_bytes


class Spread:
    """The shards of a world's study, and what their machines did."""

    def __init__(self, world, shards):
        compute = world.prepared.spec.compute.model_copy(update={"shards": shards})
        spec = world.prepared.spec.model_copy(update={"compute": compute})
        self.world, self.prepared = world, world.prepared.model_copy(update={"spec": spec})
        self.parts = split(self.prepared, shards)
        self.steps, self.at_work, self.most = [], set(), 0
        shutil.copytree(world.places[0].corpora, world.home.corpora)

    def place(self, number):
        """Count a shard, and bring its summary home."""
        part, home = self.parts[number], self.world.home
        analyze(self.prepared, self.world.places[number], synthetic.Silent(), sequences=range(part.first, part.stop))
        draft = draft_of(part, self.prepared, home)
        shutil.copytree(self.world.own(self.world.places[number]), draft)
        write_record(draft, {"sequences": part.span})
        place_shard(part, self.prepared, home)

    def measure(self, run, number, fail=False):
        part, machine = self.parts[number], Here(self.world.places[number])
        self.at_work.add(number)

        def step(verb, made, more):
            assert verb == "formats" and number in self.at_work
            self.most = max(self.most, len(self.at_work))
            if fail:
                raise JobFailed("the disk is gone")
            options = {"sequences": range(part.first, part.stop), "summary": Path(more[1])}
            told = run_formats(self.prepared, self.world.places[number], synthetic.Silent(), **options)
            self.steps.append((number, told["measured"]))
            return told

        @contextlib.contextmanager
        def paused():
            self.at_work.discard(number)
            yield
            self.at_work.add(number)

        work = ShardAtWork(run, part, machine, synthetic.Silent(), step, lambda: time.sleep(0.01), paused)
        return measure_shard(work)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("outliers.dispatch.shard_formats.LOOK_SECONDS", 0.01)


@pytest.mark.studies
def test_shards_wait_for_each_other_and_go_on_where_a_run_was_ended(tmp_path, quick):
    world = World(tmp_path, [2, 4])
    spread, home = Spread(world, 3), world.home
    whole = world.whole()
    for number in (0, 1):
        spread.place(number)
    first = quiet_run(spread.prepared, home)
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(spread.measure, first, number) for number in (0, 1)]
        time.sleep(0.2)
        # nothing is measured before all have counted, and those that wait hold no slot
        assert (spread.steps, spread.at_work) == ([], set())
        first.failed_parts.set()
        for wait in waits:
            with pytest.raises(JobFailed, match="waited for another part, which failed"):
                wait.result(30)
        assert first.gave_up == {1, 2}
        spread.place(2)
        second = quiet_run(spread.prepared, home)
        failing = [pool.submit(spread.measure, second, number, number == 1) for number in range(3)]
        with pytest.raises(JobFailed, match="the disk is gone"):
            failing[1].result(30)
        until = time.monotonic() + 30
        while sorted(spread.steps) != [(0, "ranges"), (2, "ranges")] or spread.at_work - {1}:
            assert time.monotonic() < until, spread.steps
            time.sleep(0.01)
        second.cancel()
        for number in (0, 2):
            with pytest.raises(StudyCancelled):
                failing[number].result(30)
        assert [is_here(part, spread.prepared, home) for part in spread.parts] == [False] * 3
        assert all(is_counted_here(part, spread.prepared, home) for part in spread.parts)
        spread.at_work.clear()
        third = quiet_run(spread.prepared, home)
        for done in [pool.submit(spread.measure, third, number) for number in range(3)]:
            assert done.result(60) > 0
    # each once: what the ended runs measured was not measured again
    assert sorted(spread.steps) == [(number, made) for number in range(3) for made in ("errors", "ranges")]
    folders = [folder_of(part, spread.prepared, home) for part in spread.parts]
    assert all(is_here(part, spread.prepared, home) for part in spread.parts)
    merged = merge_summaries(folders, home).folder
    join_shard_formats(third, folders, merged)
    assert errors_of(merged) == errors_of(whole)
    made = write_study(spread.prepared, home, synthetic.Silent())
    alone = open_workspace(tmp_path / "whole")
    assert made["results_digest"] == write_study(world.prepared, alone, synthetic.Silent())["results_digest"]
    tables = [space.study(world.prepared.study_id) / "quantization.parquet" for space in (home, alone)]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_a_shard_that_is_made_again_with_other_numbers_makes_all_measure_again(tmp_path, quick):
    world = World(tmp_path, [3], formats=("int8_tensor",))
    spread, home = Spread(world, 2), world.home
    for number in (0, 1):
        spread.place(number)
    with ThreadPoolExecutor(2) as pool:
        run = quiet_run(spread.prepared, home)
        assert all(seconds >= 0 for seconds in pool.map(lambda number: spread.measure(run, number), (0, 1)))
    larger = world.acts["attn_in"].copy()
    larger[0, 1, 1, 1] = 0x4640
    world.acts["attn_in"] = larger
    shutil.rmtree(world.places[0].capture(world.prepared.capture_id))
    world.place("part0", world.spans[0])
    spread.place(0)
    folders = [folder_of(part, spread.prepared, home) for part in spread.parts]
    merged = merge_summaries(folders, home).folder
    with pytest.raises(SummaryMismatch, match=r"a part was made again on other hardware\. Run the same again"):
        join_shard_formats(run, folders, merged)
    assert not any(is_here(part, spread.prepared, home) for part in spread.parts)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: spread.measure(quiet_run(spread.prepared, home), number), (0, 1)))
    merged = merge_summaries(folders, home).folder
    join_shard_formats(run, folders, merged)
    assert errors_of(merged) == errors_of(world.whole())


def test_a_machine_that_gives_other_errors_is_refused(tmp_path, quick):
    world = World(tmp_path, [3], formats=("int8_token",))
    spread = Spread(world, 2)
    for number in (0, 1):
        spread.place(number)
    run, lied = quiet_run(spread.prepared, world.home), threading.Event()

    class Liar(Here):
        def download(self, remote, local, **asked):
            super().download(remote, local, **asked)
            if not lied.is_set():
                lied.set()
                shutil.copytree(world.whole() / "formats", local, dirs_exist_ok=True)

    part = spread.parts[0]

    def step(verb, made, more):
        return run_formats(
            spread.prepared, world.places[0], synthetic.Silent(), sequences=range(3), summary=Path(more[1])
        )

    work = ShardAtWork(run, part, Liar(world.places[0]), synthetic.Silent(), step, lambda: None, contextlib.nullcontext)
    with pytest.raises(JobFailed, match="gives other errors of formats of part 1 of 2 than were asked for"):
        measure_shard(work)
    assert not is_here(part, spread.prepared, world.home)
