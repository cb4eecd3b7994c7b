"""--store none: a study that is counted in the forward pass has the results of the stored one, byte for byte."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from outliers.capture.extract import extract
from outliers.counting import pass_counts
from outliers.counting.in_pass.device import DeviceCounter
from outliers.counting.pass_counts import PassCounts
from outliers.counting.rolling import open_windows
from outliers.counting.summary_files import TOTALS, read_counts, read_summary
from outliers.errors import BadInput, CorruptCapture, CountMismatch
from outliers.spec import StudySpec
from outliers.steps import capture_exists, run_analyze, run_extract, run_report, run_verify
from outliers.store.captures import list_captures
from outliers.workspace import open_workspace
from tests.counting.test_in_pass import same_counts
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.synthetic import Silent

ROOT = Path(__file__).resolve().parents[2]
SITES = ("attn_in", "mlp_in", "o_in", "resid")


def counted(place, folder, text, store, pause=lambda point: None, **parts):
    """(workspace, study, results_digest) of a study with that store, its numbers in its workspace."""
    workspace = open_workspace(place)
    parts = {name: dict(part) if isinstance(part, dict) else part for name, part in parts.items()}
    capture = {"store": store, "store_sequences": 1, **parts.pop("capture", {})}
    study = prepared(workspace, folder, text, capture=capture, **parts)
    run_extract(study, workspace, Silent(), pause=pause)
    run_analyze(study, workspace, Silent())
    return workspace, study, run_report(study, workspace, Silent(), numbers=True)["results_digest"]


def assert_same(one, other):
    """The private summaries of two workspaces: totals byte for byte, and each sequence's counts."""
    (ours, study, mine), (theirs, same, digest) = one, other
    assert (study.study_id, study.capture_id, mine) == (same.study_id, same.capture_id, digest)
    folders = [at.summary(study.capture_id, study.study_id) for at in (ours, theirs)]
    assert (folders[0] / TOTALS).read_bytes() == (folders[1] / TOTALS).read_bytes()
    frame = read_summary(folders[0]).frame
    counts = [list(read_counts(folder, frame)) for folder in folders]
    assert len(counts[0]) == len(counts[1])
    for mine, its in zip(*counts, strict=True):
        same_counts(mine, its)
        assert (mine.nll, mine.nll_tokens) == (its.nll, its.nll_tokens)


@pytest.mark.parametrize(
    ("family", "dtype", "parts"),
    [
        ("Llama", "bfloat16", {"capture": {"sites": SITES, "perplexity": True}, "sequences": 5}),
        ("Llama", "float32", {"capture": {"batch_sequences": 2}, "sequences": 5}),
        ("GPTNeoX", "float16", {"capture": {"batch_sequences": 3, "layers": (0, 2)}}),
        ("Falcon", "bfloat16", {}),  # one norm feeds attention and MLP: one tensor, two sites
        ("Gemma2", "bfloat16", {"capture": {"sites": ("mlp_in", "down_in")}, "criteria": {"site": "down_in"}}),
        ("GPT2", "float32", {"capture": {"sites": ("attn_in", "mlp_in", "resid")}}),
    ],
)
def test_families_have_the_results_of_the_full_store(tmp_path, text, family, dtype, parts):
    folder = tiny.make_model(tmp_path / "model", family)
    parts = {"model": {"dtype": dtype}, **parts}
    full = counted(tmp_path / "full", folder, text, "full", **parts)
    none = counted(tmp_path / "none", folder, text, "none", **parts)
    assert_same(full, none)
    workspace, study, _ = none
    chunks = {int(path.name.split(".")[2]) for path in workspace.captures.glob("*/activations.zarr/*/c.*.*.*.0")}
    size = study.spec.capture.batch_sequences
    assert chunks == set(range(size))
    (held,) = list_captures(workspace)
    assert (held.done, held.counted) == (size, study.corpus.num_sequences - size)
    assert capture_exists(study, workspace)
    run_verify(study, workspace, Silent())


def test_massive_float32_values_take_a_second_pass(tmp_path, text, llama):
    from safetensors.torch import load_file, save_file

    folder = Path(tiny.make_model(tmp_path / "model", "Llama"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 5] = 3000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    parts = {"capture": {"sites": ("resid",)}, "model": {"dtype": "float32"}}
    full = counted(tmp_path / "full", folder, text, "full", **parts)
    none = counted(tmp_path / "none", folder, text, "none", **parts)
    summary = read_summary(none[0].summary(none[1].capture_id, none[1].study_id))
    assert summary.massive_cells.all()
    assert summary.fine.size
    assert_same(full, none)


class Killed(Exception):
    """The end of a process."""


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, text, llama):
    """It ends at every point of a checkpoint in turn, and a process counts at most a window twice."""
    full = counted(tmp_path / "full", llama, text, "full", sequences=6, capture={"perplexity": True})
    for ends in range(1, 10):
        place, kills = tmp_path / f"none-{ends}", [ends, 4 + ends % 5]

        def pause(point, kills=kills):
            if kills:
                kills[0] -= 1
                if kills[0] == 0:
                    kills.pop(0)
                    raise Killed

        for _ in range(2):
            with pytest.raises(Killed):
                counted(place, llama, text, "none", pause, sequences=6, capture={"perplexity": True})
        none = counted(place, llama, text, "none", pause, sequences=6, capture={"perplexity": True})
        assert_same(full, none)


KILLED = """
import os, signal, sys
from outliers.spec import StudySpec
from outliers.steps import run_extract
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support.synthetic import Silent
spec = StudySpec.model_validate_json(sys.argv[1])
left = int(sys.argv[3])
def pause(point):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
workspace = open_workspace(sys.argv[2])
run_extract(prepare(spec, workspace), workspace, Silent(), pause=pause)
"""


@pytest.mark.long
def test_a_process_that_is_killed_leaves_what_another_finishes(tmp_path, text, llama):
    full = counted(tmp_path / "full", llama, text, "full", sequences=5)
    spec = StudySpec.model_validate(
        tiny.spec_for(llama, text, sequences=5, capture={"store": "none", "store_sequences": 1})
    )
    command = [sys.executable, "-c", KILLED, spec.model_dump_json(), str(tmp_path / "none"), "6"]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=600, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert_same(full, counted(tmp_path / "none", llama, text, "none", sequences=5))


class ByTorch(PassCounts):
    """The reference in a real pass, whose tensors are torch's inference tensors."""

    def _open_counter(self, begun):
        return DeviceCounter(self.tally.frame, self._shape, begun=begun)


def test_torchs_operators_count_a_real_pass(tmp_path, text, llama):
    parts = {"sequences": 5, "model": {"dtype": "bfloat16"}, "capture": {"sites": SITES, "batch_sequences": 2}}
    full = counted(tmp_path / "full", llama, text, "full", **parts)
    workspace = open_workspace(tmp_path / "none")
    capture = parts["capture"] | {"store": "none", "store_sequences": 1}
    study = prepared(workspace, llama, text, **parts | {"capture": capture})
    extract(study, workspace, Silent(), open_windows=partial(open_windows, study, workspace, Silent(), kind=ByTorch))
    run_analyze(study, workspace, Silent())
    assert_same(full, (workspace, study, run_report(study, workspace, Silent(), numbers=True)["results_digest"]))


class _OneMore:
    """A sink that changes a value on its way to the counter."""

    def __init__(self, counter):
        self.counter = counter

    def __getattr__(self, name):
        return getattr(self.counter, name)

    def submit(self, key, tensor):
        changed = tensor.clone()
        if key[1:] == ("mlp_in", 1):
            changed[0, 3, 2] = 9.5
        self.counter.submit(key, changed)


class Wrong(PassCounts):
    def sink(self):
        return _OneMore(super().sink())


def test_a_study_whose_counts_are_not_those_of_its_stored_values_is_refused(tmp_path, text, llama):
    workspace = open_workspace(tmp_path)
    study = prepared(workspace, llama, text, capture={"store": "none"})
    windows = partial(open_windows, study, workspace, Silent(), kind=Wrong)
    with pytest.raises(
        CountMismatch, match=r"in the forward pass on cpu .*\(0:1\) differ in .* at mlp_in, .*layer 1, feature 2"
    ):
        extract(study, workspace, Silent(), open_windows=windows)
    assert not capture_exists(study, workspace)


def test_a_run_that_goes_on_checks_its_counter_on_the_stored_values(tmp_path, text, llama):
    def pause(point, seen=[]):  # noqa: B006 - counts the calls
        seen.append(point)
        if len(seen) == 8:
            raise Killed

    with pytest.raises(Killed):
        counted(tmp_path, llama, text, "none", pause, sequences=5)
    workspace = open_workspace(tmp_path)
    (chunk,) = workspace.captures.glob("*/activations.zarr/mlp_in/c.1.0.0.0")
    content = bytearray(chunk.read_bytes())
    content[40] ^= 0x40
    chunk.write_bytes(content)
    with pytest.raises(CorruptCapture, match="checksum"):
        counted(tmp_path, llama, text, "none", sequences=5)


def test_the_other_store_goes_on_where_one_ended(tmp_path, text, llama):
    """Lines and files are the same: counted in the pass, then by windows, and the other way round."""
    full = counted(tmp_path / "full", llama, text, "full", sequences=6, capture={"sites": ("resid",)})
    for first, second in (("none", "rolling"), ("rolling", "none")):

        def pause(point, left=[7]):  # noqa: B006 - counts the calls
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        capture = {"sites": ("resid",)} | ({"disk_window": 1e-9} if first == "rolling" else {})
        with contextlib.suppress(Killed):
            counted(tmp_path / first, llama, text, first, pause, sequences=6, capture=capture)
        assert_same(full, counted(tmp_path / first, llama, text, second, sequences=6, capture={"sites": ("resid",)}))


def test_what_cannot_be_had_is_refused_before_a_model_is_loaded(tmp_path, text):
    folder = tiny.make_model(tmp_path / "mixture", "Mixtral")
    workspace = open_workspace(tmp_path / "ws")
    with pytest.raises(BadInput, match=r"--store none counts no experts, .* give --experts off, or --store rolling"):
        prepared(workspace, folder, text, capture={"store": "none"})
    prepared(workspace, folder, text, capture={"store": "none", "experts": "off"})
    for parts, words in (
        ({"formats": {"formats": ("int8_token",)}}, "--store none keeps the first sequences alone"),
        ({"compute": {"executor": "dask=tcp://10.0.0.5:8786"}}, "--executor dask=.* and --store none"),
        ({"probe": {"probe": "check"}, "capture": {"store": "none", "store_sequences": 1}}, "give --store-sequences"),
        ({"capture": {"store": "none", "disk_window": 1.0}}, "--store none has none"),
    ):
        with pytest.raises(ValidationError, match=words):
            StudySpec.model_validate(tiny.spec_for(folder, text, **{"capture": {"store": "none"}, **parts}))


def test_a_shard_stores_its_own_first_batch(tmp_path, text, llama):
    workspace = open_workspace(tmp_path)
    study = prepared(workspace, llama, text, sequences=6, capture={"store": "none", "store_sequences": 2})
    run_extract(study, workspace, Silent(), sequences=range(3, 6))
    run_analyze(study, workspace, Silent(), sequences=range(3, 6))
    summary = read_summary(workspace.summary(study.capture_id, study.study_id))
    assert summary.sequences.tolist() == [3, 4, 5]
    chunks = {int(path.name.split(".")[2]) for path in workspace.captures.glob("*/activations.zarr/*/c.*.*.*.0")}
    assert chunks == {3}


def test_a_checkpoint_comes_after_a_time_not_after_every_batch(tmp_path, text, llama):
    points = []
    counted(tmp_path, llama, text, "none", points.append, sequences=12)
    windows = points.count("captured")
    assert 3 <= windows <= 5  # 1, 1, 2, 4, and the rest: each at most twice the one before
    assert pass_counts.CHECKPOINT_SECONDS >= 1
    assert torch.get_num_threads() >= 1
