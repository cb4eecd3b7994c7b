"""Readings of experts that are stopped or killed: they end with the bits of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from outliers.capture import experts as capture_experts
from outliers.capture.extract import extract
from outliers.counting.analyze import analyze
from outliers.experts.totals_files import read_totals
from outliers.steps import capture_exists
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support.expert_captures import arrays_of, same_arrays, sums_in
from tests.support.synthetic import Silent


class Stop(Exception):
    """Ends a pass where a test says."""


@pytest.mark.parametrize("saves", [0.0, 1e9], ids=["sums saved after each batch", "sums saved at the end"])
def test_an_interrupted_reading_ends_as_one_that_was_not(monkeypatch, tmp_path, study, deepseek, saves):
    """Stopped in the middle of each batch in turn, it ends with the bits of an uninterrupted one, sums included."""
    workspace, whole = study
    extract(whole, workspace, Silent())
    monkeypatch.setattr(capture_experts, "SAVE_SECONDS", saves)
    monkeypatch.setattr(capture_experts, "SAVE_SHARE", 0)
    other = open_workspace(tmp_path / "other")
    prepare(whole.spec, other)
    real, calls = capture_experts.add_layer, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) in (3, 6, 8):
            raise Stop
        real(*arguments)

    monkeypatch.setattr(capture_experts, "add_layer", failing)
    stops = 0
    while True:
        try:
            extract(whole, other, Silent())
            break
        except Stop:
            stops += 1
    assert stops == 3
    same_arrays(sums_in(workspace, whole), sums_in(other, whole))
    for one, two in zip(arrays_of(workspace, whole)[0].values(), arrays_of(other, whole)[0].values(), strict=True):
        assert one.tobytes() == two.tobytes()
    assert capture_exists(whole, other)


def test_eager_experts_are_counted_as_they_are_computed_and_stopped_readings_go_on(monkeypatch, tmp_path, study):
    """The bits of a capture that waits for each layer's end, also where it is stopped in the middle of a layer, or mended."""
    _, whole = study
    eager = whole.model_copy(update={"model": whole.model.model_copy(update={"experts_implementation": "eager"})})
    real, given, left = capture_experts.ExpertStream.add, [], [1 << 30]

    def add(self, *arguments):
        given.append(None)
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        real(self, *arguments)

    def captured(name):
        workspace = open_workspace(tmp_path / name)
        prepare(eager.spec, workspace)
        extract(eager, workspace, Silent())
        return workspace

    monkeypatch.setattr(capture_experts.ExpertStream, "add", add)
    waits = capture_experts.ExpertWatch
    with monkeypatch.context() as patch:
        patch.setattr(capture_experts, "ExpertWatch", lambda *arguments: waits(*arguments[:4]))
        one = captured("waits")
    assert not given
    spaces = [captured("streams")]
    assert len(given) > 6
    for number in (3, len(given) - 2):
        left[0] = number
        with pytest.raises(Stop):
            captured(f"stopped {number}")
        spaces.append(captured(f"stopped {number}"))
    chunk = next((spaces[0].capture(eager.capture_id) / "activations.zarr" / "mlp_in").rglob("c.*"))
    chunk.unlink()  # of a batch that is in the sums already: its table alone is written again
    extract(eager, spaces[0], Silent())
    for other in spaces:
        same_arrays(sums_in(one, eager), sums_in(other, eager))
        for mine, theirs in zip(arrays_of(one, eager)[0].values(), arrays_of(other, eager)[0].values(), strict=True):
            assert mine.tobytes() == theirs.tobytes()


@pytest.mark.studies
def test_a_kill_at_any_instant_changes_nothing(tmp_path, study, deepseek):
    """SIGKILL while a process reads, ten times; then it is left to end."""
    workspace, whole = study
    extract(whole, workspace, Silent())
    other = open_workspace(tmp_path / "killed")
    prepare(whole.spec, other)
    spec = tmp_path / "study.json"
    spec.write_text(whole.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from outliers.capture import experts;"
        "from outliers.capture.extract import extract;"
        "from outliers.study.prepare import read_prepared; from outliers.workspace import open_workspace;"
        "from tests.support.synthetic import Silent; experts.SAVE_SECONDS = 0; experts.SAVE_SHARE = 0;"
        "w = open_workspace(Path(sys.argv[2])); print('ready', flush=True);"
        "extract(read_prepared(Path(sys.argv[1]), w), w, Silent())"
    )
    chance, folder = random.Random(0), other.capture(whole.capture_id)
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(spec), str(other.root)], stdout=subprocess.PIPE, env=dict(os.environ)
        )
        child.stdout.readline()
        strikes = [lambda: (folder / "experts").exists(), lambda: (folder / "journal.jsonl").exists()]
        now, until = chance.choice(strikes), time.monotonic() + 20
        while child.poll() is None and not now() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    extract(whole, other, Silent())
    same_arrays(sums_in(workspace, whole), sums_in(other, whole))
    one, two = (read_totals(analyze(whole, home, Silent())) for home in (workspace, other))
    same_arrays(one, two)
