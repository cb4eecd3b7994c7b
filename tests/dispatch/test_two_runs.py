"""Two studies at once in one process: neither hears the other, and the cancel of one leaves the other alone."""

from __future__ import annotations

import threading
import time

import pytest

from outliers.dispatch.study import dispatch_study
from outliers.dispatch.study_run import StudyCancelled
from outliers.jobs import jobs
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.runs import quiet_run

TEXT = "All that is gold does not glitter, not all those who wander are lost. " * 1500
LONG, SHORT, TOKENS = 200, 6, 256


class Running:
    """A study that a thread of this process runs by `dispatch_study`, and what its listener has heard."""

    def __init__(self, folder, workspace, name, num_sequences, **compute):
        model = tiny.make_model(folder / name, "Llama", hidden_size=64, num_hidden_layers=8, vocab_size=256 + len(name))
        corpus = {"source": str(folder / "book.txt"), "num_sequences": num_sequences, "sequence_length": TOKENS}
        spec = {"model": str(model), "corpus": corpus, "compute": {"workspace": str(workspace.root), **compute}}
        self.run = quiet_run(prepare(StudySpec.model_validate(spec), workspace), workspace, name)
        self.heard, self.ended = [], []
        self.run.listen(lambda step, event: self.heard.append(event))
        self.thread = threading.Thread(target=self._dispatch, name=name)
        self.thread.start()

    def _dispatch(self):
        try:
            self.ended.append(dispatch_study(self.run))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            self.ended.append(error)

    def extracted(self):
        """(done, total) of each progress of an extraction that was heard."""
        return [(event.done, event.total) for event in self.heard if event.step.startswith("extract") and event.total]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.studies
def test_a_cancel_ends_its_own_study_and_each_hears_its_own_events(tmp_path, shards):
    (tmp_path / "book.txt").write_text(TEXT)
    workspace = open_workspace(tmp_path / "workspace")
    cancelled = Running(tmp_path, workspace, "cancelled", LONG, shards=shards)
    other = Running(tmp_path, workspace, "other", SHORT)
    until = time.monotonic() + 120
    while not any(done for done, _ in cancelled.extracted()):
        assert time.monotonic() < until and not cancelled.ended, cancelled.ended
        time.sleep(0.02)
    assert other.thread.is_alive(), "it ended too early to show anything"
    cancelled.run.cancel()
    cancelled.thread.join(60)
    assert [type(end) for end in cancelled.ended] == [StudyCancelled]
    journaled = [
        len(path.read_text().splitlines())
        for path in workspace.root.glob(f"**/captures/{cancelled.run.prepared.capture_id}/journal.jsonl")
    ]
    assert 0 < sum(journaled) < LONG, "cancelled too late to show anything"
    spaces = [workspace.root, *(workspace.root / "shards").glob("*")]
    left = {handle.name for space in spaces for handle in jobs.running(space)}
    assert not [name for name in left if cancelled.run.prepared.capture_id in name]
    # its end does not end the other, which gets to its results
    other.thread.join(120)
    (outcome,) = other.ended
    assert not isinstance(outcome, BaseException), outcome
    assert outcome.study_id == other.run.prepared.study_id
    assert (workspace.study(outcome.study_id) / "manifest.json").exists()
    # each total is of one study alone
    assert {total for _, total in cancelled.extracted()} == {LONG * TOKENS // shards}
    assert {total for _, total in other.extracted()} == {SHORT * TOKENS}
    steps = {event.step.partition(" ")[0] for event in other.heard if event.kind == "progress"}
    assert {"extract", "analyze", "report"} <= steps
    assert "analyze" not in {event.step.partition(" ")[0] for event in cancelled.heard}


def test_what_one_run_knows_no_other_does(tmp_path):
    """Offsets, files that were sent, guards and listeners are a run's own."""
    workspace = open_workspace(tmp_path)
    made = tiny.make_model(tmp_path / "model")
    prepared = prepare(StudySpec.model_validate(tiny.spec_for(made, "builtin:python-docs", 4, 32)), workspace)
    one, other = quiet_run(prepared, workspace), quiet_run(prepared, workspace)

    class Machine:
        name, instance_id, provider = "m", "disk", "ssh"

    handle = jobs.JobHandle("extract-x", 1, tmp_path)
    one.note_offset(Machine, handle, 7)
    one.note_sent(Machine, "studies/x.json")
    assert (one.offset(Machine, handle), other.offset(Machine, handle)) == (7, 0)
    assert (one.was_sent(Machine, "studies/x.json"), other.was_sent(Machine, "studies/x.json")) == (True, False)
    assert (one.refusal(lambda: "too many"), other.refusal(lambda: None)) == ("too many", None)
    assert one.refusal(lambda: None) == "too many"
    with one.guarded_by(lambda: 1 / 0):
        with pytest.raises(ZeroDivisionError):
            one.check()
        other.check()
    one.cancel()
    with pytest.raises(StudyCancelled):
        one.check()
    other.check()
