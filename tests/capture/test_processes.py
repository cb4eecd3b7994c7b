"""A capture that several processes read: real ones, on the CPU, are one process bit for bit, whatever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from outliers.capture.devices import Devices, choose_devices
from outliers.capture.extract import extract
from outliers.capture.processes import WORKERS, Team, await_earlier
from outliers.capture.together import Together, environments, prepared_for_each
from outliers.errors import JobFailed, PlanRefused
from outliers.experts.sums_files import load_sums
from outliers.locks import acquire
from outliers.store.chunks import Journal
from outliers.store.fingerprint import layout_from, read_fingerprint
from outliers.workspace import open_workspace
from tests.capture.test_devices import GB, NO_SMI, Cuda
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.synthetic import Silent

A = "NVIDIA A100"


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines, self.counts = [], []

    def log(self, level, message):
        self.lines.append((level, message))

    def progress(self, step, done, total, unit):
        self.counts.append((step, done, total))


def study_of(workspace, model, text, sequences=6, **parts):
    return prepared(workspace, model, text, sequences=sequences, **parts)


# Which GPUs each process sees


def test_two_gpus_are_two_processes_that_ask_for_their_memory_themselves(workspace, llama, text):
    study = study_of(workspace, llama, text)
    two = Cuda((A, 40 * GB), (A, 40 * GB), taken={0: 40 * GB})
    found = choose_devices(study.spec, study.model, two, NO_SMI, several=True, ram_bytes=500 * GB)
    assert (found.kind, found.first, [one.gpus for one in found.others]) == (A, "cuda:0", [(1,)])
    with pytest.raises(PlanRefused, match="GPU 0"):
        choose_devices(study.spec, study.model, two, NO_SMI)
    alone = choose_devices(study.spec, study.model, Cuda((A, 40 * GB)), NO_SMI, several=True, ram_bytes=500 * GB)
    assert (alone.placement.gpus, alone.others) == ((0,), ())
    scarce = choose_devices(study.spec, study.model, Cuda(*[(A, 40 * GB)] * 2), NO_SMI, several=True, ram_bytes=GB)
    assert scarce.others == ()


def test_each_process_sees_its_own_gpus_and_takes_all_of_them(workspace, llama, text, monkeypatch):
    study = study_of(workspace, llama, text)
    cuda = Cuda(*[(A, 40 * GB)] * 3)
    found = choose_devices(study.spec, study.model, cuda, NO_SMI, several=True, ram_bytes=500 * GB)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments(found, 3, 3)] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5,7")
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments(found, 2, 3)] == ["GPU-a", "5"]
    compute = prepared_for_each(study, found).spec.compute
    assert (compute.processes, compute.gpu_count) == (1, 1)
    assert prepared_for_each(study, found).capture_id == study.capture_id
    assert environments(Devices("cpu"), 2, 0) == ({}, {})
    assert prepared_for_each(study, Devices("cpu")).spec.compute.gpu_count is None


# What each process reads


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("chosen", "batch"), [(range(7), 2), (range(8, 16), 4), (range(3), 1)])
def test_shares_are_whole_batches_of_which_each_has_one_reader(workspace, llama, text, chosen, batch, count):
    study = study_of(workspace, llama, text, 16, capture={"batch_sequences": batch})
    runs = [range(s, min(s + batch, chosen.stop)) for s in range(chosen.start, chosen.stop, batch)]
    left = [(run, number % 3 != 2) for number, run in enumerate(runs) if number != 1]  # the second is done
    work = Together(study, workspace, Devices("cpu"), Silent(), None, None, left)
    shares = work.shares(chosen, count)
    assert len(shares) == count
    given = [batch for share in shares if share is not None for batch in share.batches]
    assert given == [(run.start, run.stop, read) for run, read in left]
    spans = [share.span for share in shares if share is not None]
    assert all(first % batch == 0 for first, _ in spans)
    # the spans do not depend on what is left, so that sums go on in the same files
    everything = Together(study, workspace, Devices("cpu"), Silent(), None, None, [(run, True) for run in runs])
    assert set(spans) <= {share.span for share in everything.shares(chosen, count) if share is not None}


LIGHT = (sys.executable, "-m", "tests.support.light_worker")


@pytest.fixture
def team(workspace, llama, text):
    """Reads 8 sequences of 24 tokens with light workers, one for each of the things they do; (results, journal, reporter)."""
    study = study_of(workspace, llama, text, 8, capture={"batch_sequences": 2})
    folder = workspace.capture(study.capture_id)
    folder.mkdir(parents=True)

    def run(*does, all_of_them=False):
        heard, journal = Heard(), Journal(folder / "journal.jsonl")
        environments = [{"WORKER": what, "CUDA_VISIBLE_DEVICES": str(n)} for n, what in enumerate(does)]
        batches = [(range(s, s + 2), True) for s in range(0, 8, 2)]
        work = Together(study, workspace, Devices("cpu"), heard, journal, None, batches)
        with Team(study, workspace, environments, heard, LIGHT) as made:
            count = made.gather(all_of_them=all_of_them)
            results = made.read(work.shares(range(8), count), journal, 8 * 24, 0)
        return results, Journal.open(folder / "journal.jsonl"), heard

    run.folder = folder
    return run


def test_what_they_finish_is_journaled_by_one_and_counted_together(team):
    results, journal, heard = team("", "")
    assert [(one["sequences"], one["visible"]) for one in results] == [(4, "0"), (4, "1")]
    assert sorted(journal.done) == list(range(8))
    writers = [journal.done[s]["of"] for s in range(8)]
    assert writers[:4] == writers[:1] * 4 and writers[4:] == writers[4:5] * 4 and writers[0] != writers[4]
    assert heard.counts[-1] == ("extract", 192, 192)
    done = [count for _, count, _ in heard.counts]
    assert done == sorted(done)
    assert {message for _, message in heard.lines} == {"process 1 of 2: read 4", "process 2 of 2: read 4"}
    assert workers_of(os.getpid()) == []


def test_one_whose_gpus_are_taken_is_left_out_and_the_others_read_all(team):
    results, journal, heard = team("refuse", "", "")
    assert [one["visible"] for one in results] == ["1", "2"]
    assert sorted(journal.done) == list(range(8))
    assert ("warning", "process 1 of 3 is left out: GPU 0 (A100) has 1 of 40 GB free") in heard.lines


def test_where_so_many_were_asked_for_or_none_is_left_it_is_refused(team):
    for does, everyone in ((("", "refuse"), True), (("refuse", "refuse"), False)):
        with pytest.raises(PlanRefused, match="has 1 of 40 GB free"):
            team(*does, all_of_them=everyone)
    assert not (team.folder / "journal.jsonl").exists()


def test_more_processes_than_batches_are_dismissed(team):
    results, journal, _ = team("", "", "", "", "", "")
    assert [one["sequences"] for one in results] == [2, 2, 2, 2]
    assert sorted(journal.done) == list(range(8))


ENDS = [
    ("die", JobFailed, r"process 2 of 2 \(sequences 4:8\) was killed \(signal 9\), most likely because memory ran out"),
    ("crash", JobFailed, r"process 2 of 2 \(sequences 4:8\) ended with exit code 3"),
    ("fail", OSError, "No space left on device"),
]


@pytest.mark.parametrize(("does", "error", "said"), ENDS)
def test_the_first_that_fails_ends_all_with_its_error_and_what_is_journaled_stays(team, does, error, said):
    with pytest.raises(error, match=said):
        team("wait", does)
    assert workers_of(os.getpid()) == []
    done = Journal.open(team.folder / "journal.jsonl").done
    assert {4, 5} <= set(done) <= {0, 1, 2, 3, 4, 5}


def test_a_journal_that_takes_no_more_ends_them(team, monkeypatch):
    def full(self, entries):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(OSError, match="No space"):
        team("wait", "wait")
    assert workers_of(os.getpid()) == []


def test_a_run_waits_for_workers_of_an_earlier_one(tmp_path):
    before = acquire(tmp_path / WORKERS)
    came = threading.Event()
    thread = threading.Thread(target=lambda: (await_earlier(tmp_path), came.set()))
    thread.start()
    assert not came.wait(0.1)
    os.close(before)
    assert came.wait(20)
    thread.join()


# Real processes


def content(workspace, study):
    """Every file of a capture that is of its activations, by name, and its journal's lines in order of their sequence."""
    root = workspace.capture(study.capture_id)
    aside = {"lock", "journal.jsonl", "extractions.jsonl", WORKERS}
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name not in aside}
    files = {name: data for name, data in files.items() if not name.startswith("experts/")}
    return files, sorted((root / "journal.jsonl").read_bytes().splitlines())


def workers_of(pid):
    """The workers that a process has started."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if {"outliers.capture.worker", "tests.support.light_worker"} & set(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def gone(processes, seconds=20.0):
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def journaled(workspace, study):
    try:
        return (workspace.capture(study.capture_id) / "journal.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


@pytest.mark.long
def test_two_processes_are_one_bit_for_bit_though_one_is_killed(tmp_path, llama, text):
    """Of two processes one is killed: the study ends with that, the other goes too, and what was journaled stays."""
    long = {
        "corpus": {"num_sequences": 160, "sequence_length": 24},
        "capture": {"batch_sequences": 2, "perplexity": True},
    }
    alone = open_workspace(tmp_path / "alone")
    whole = study_of(alone, llama, text, **long)
    extract(whole, alone, Silent())
    workspace = open_workspace(tmp_path / "both")
    study = study_of(workspace, llama, text, **long, compute={"processes": 2})
    assert study.capture_id == whole.capture_id
    failed: list[BaseException] = []

    def run():
        try:
            extract(study, workspace, Silent())
        except BaseException as error:  # noqa: BLE001 - it is what is tested
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: journaled(workspace, study) > 0)
    both = workers_of(os.getpid())
    both[0].send_signal(signal.SIGKILL)
    thread.join()
    assert len(both) == 2
    assert gone(both), "the other one lives on"
    (error,) = failed
    assert isinstance(error, JobFailed)
    assert "of 2 (sequences " in str(error) and "was killed (signal 9), most likely because memory ran out" in str(
        error
    )
    before = journaled(workspace, study)
    assert 0 < before < 160, "it was killed after the end"

    heard = Heard()
    result = extract(study, workspace, heard)
    assert content(workspace, study) == content(alone, whole)
    assert (result["processes"], result["sequences"], result["gpus"]) == (2, 160 - before, 0)
    assert result["tokens"] == (160 - before) * 24
    counts = [done for step, done, _ in heard.counts if step == "extract"]
    assert {total for step, _, total in heard.counts if step == "extract"} == {160 * 24}
    assert counts == sorted(counts) and counts[-1] == 160 * 24 and counts[0] >= before * 24
    assert any(message.startswith("process 2 of 2: loaded ") for _, message in heard.lines)
    assert extract(study, workspace, Silent())["sequences"] == 0


@pytest.mark.long
def test_the_process_that_started_them_takes_them_along(tmp_path, llama, text):
    """SIGKILL of the one that has the journal: no worker lives on, and one process finishes what two began."""
    long = {"corpus": {"num_sequences": 160, "sequence_length": 24}}
    workspace = open_workspace(tmp_path / "killed")
    study = study_of(workspace, llama, text, **long, compute={"processes": 2})
    spec = tmp_path / "spec.json"
    spec.write_text(study.model_dump_json())
    argv = [sys.executable, "-m", "outliers", "extract", str(spec), "--workspace", str(workspace.root)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    until(lambda: journaled(workspace, study) > 0)
    both = workers_of(process.pid)
    process.kill()
    process.wait()
    assert len(both) == 2
    assert gone(both)
    assert 0 < journaled(workspace, study) < 160
    one = study.model_copy(
        update={
            "spec": study.spec.model_copy(update={"compute": study.spec.compute.model_copy(update={"processes": 1})})
        }
    )
    extract(one, workspace, Silent())
    alone = open_workspace(tmp_path / "alone")
    whole = study_of(alone, llama, text, **long)
    extract(whole, alone, Silent())
    assert content(workspace, study) == content(alone, whole)


@pytest.mark.long
def test_experts_are_summed_by_several_processes_as_by_one(tmp_path, text):
    """Integers and extremes are equal; float64 sums differ in the order of their terms alone. A part that one process read is
    finished by two, and the other way round."""
    model = tiny.make_model(tmp_path / "moe", "Qwen3Moe")
    found, tables = [], []
    for number, order in enumerate([(1,), (2,), (1, 2), (2, 1)]):
        workspace = open_workspace(tmp_path / f"w{number}")
        parts = [range(4), None] if len(order) == 2 else [None]
        for processes, sequences in zip(order, parts, strict=True):
            study = study_of(
                workspace, model, text, 8, capture={"batch_sequences": 2}, compute={"processes": processes}
            )
            extract(study, workspace, Silent(), sequences=sequences)
        folder = workspace.capture(study.capture_id)
        shapes = layout_from(read_fingerprint(folder)).experts
        found.append(load_sums(folder, shapes, range(8)))
        tables.append(content(workspace, study))
    first = found[0]
    for other, table in zip(found[1:], tables[1:], strict=True):
        assert table == tables[0]
        for name, value in vars(first).items():
            if name == "shapes":
                continue
            there = getattr(other, name)
            if value.dtype == np.float64:
                np.testing.assert_allclose(there, value, rtol=1e-12)
            else:
                np.testing.assert_array_equal(there, value)


@pytest.mark.long
def test_the_error_of_one_process_ends_the_study(tmp_path, llama, text):
    """A chunk that can't be written, of the second process's sequences alone: its error, and no worker is left."""
    workspace = open_workspace(tmp_path / "w")
    study = study_of(workspace, llama, text, 8, compute={"processes": 2})
    extract(study, workspace, Silent(), sequences=range(1))
    place = workspace.capture(study.capture_id) / "activations.zarr/attn_in/c.0.6.0.0"
    (place / "in the way").mkdir(parents=True)
    heard = Heard()
    with pytest.raises(Exception, match=r"c\.0\.6\.0\.0 can't be written"):
        extract(study, workspace, heard)
    assert any("process 2 of 2 (sequences 4:8) failed" in message for _, message in heard.lines)
    assert workers_of(os.getpid()) == []
    done = Journal.open(workspace.capture(study.capture_id) / "journal.jsonl").done
    assert 6 not in done
