"""Windows that are counted and freed: the bits of one count of all, wherever they end and whenever the process is killed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import analyze
from outliers.counting.rolling import is_counted, open_windows, place_summary
from outliers.counting.summary_files import read_counts, read_summary
from outliers.errors import CorruptCapture
from outliers.store.chunks import Journal
from outliers.store.journal import DONE, LOOK
from outliers.study.window import freed_bytes
from outliers.workspace import open_workspace
from tests.counting.test_counting import same_bits
from tests.counting.test_properties import LADDER, assert_same_counts, captures
from tests.support import synthetic

POINTS = ("captured", "counted", "journaled", "freeing", "freed")


class Killed(Exception):
    """The end of a process."""


def rolling_study(acts, dtype, lengths, kept, criteria):
    """A synthetic study with --store rolling."""
    made = synthetic.prepared_for(acts, dtype, criteria, lengths=lengths)
    capture = made.spec.capture.model_copy(update={"store": "rolling", "store_sequences": kept})
    return made.model_copy(update={"spec": made.spec.model_copy(update={"capture": capture})})


def with_window(prepared, layout, sequences):
    """The study with a window of that many sequences."""
    size = (sequences * freed_bytes(layout) + 0.5) / 1e9
    capture = prepared.spec.capture.model_copy(update={"disk_window": size})
    return prepared.model_copy(update={"spec": prepared.spec.model_copy(update={"capture": capture})})


class Roll:
    """A capture of given numbers that rolls by, in processes that end where `kill` says so."""

    def __init__(self, workspace, prepared, layout, acts, lengths):
        self.workspace, self.prepared, self.layout, self.acts, self.lengths = workspace, prepared, layout, acts, lengths
        self.folder = workspace.capture(prepared.capture_id)
        self.phases, self.most, self.captured = [], 0, []

    @property
    def wanted(self):
        return range(self.layout.num_sequences)

    def journal(self):
        return Journal.open(self.folder / "journal.jsonl", repair=True)

    def sequences_there(self):
        """Every sequence that has a chunk on the disk."""
        chunks = (self.folder / "activations.zarr").glob("*/c.*")
        return {int(path.name.split(".")[2]) for path in chunks}

    def run(self, sequences, kill=lambda point: False):
        """One process; True where it came to its end."""
        journal, corpus = self.journal(), load_corpus(self.prepared.corpus, self.workspace)

        def pause(point):
            self.most = max(self.most, len(self.sequences_there()))
            if kill(point):
                raise Killed

        prepared = with_window(self.prepared, self.layout, sequences)
        args = (prepared, self.workspace, synthetic.Silent(), self.wanted, corpus, self.layout, journal)
        try:
            windows = open_windows(*args, workers=1, pause=pause)
            while (window := windows.next()) is not None:
                self.phases.append(windows.line.phase)
                missing = [sequence for sequence in window if sequence not in self.journal().done]
                self.captured += missing
                given_lengths = (self.acts, missing, self.lengths)
                synthetic.write_sequences(prepared, self.workspace, self.layout, journal, *given_lengths)
                windows.take(window)
        except Killed:
            return False
        return True


def counted_at_once(place, dtype, acts, lengths, criteria, **written):
    """The folder of the summary of one count of all sequences."""
    workspace = open_workspace(place)
    prepared = synthetic.prepared_for(acts, dtype, criteria, lengths=lengths)
    synthetic.write_capture(prepared, workspace, acts, lengths=lengths, **written)
    return analyze(prepared, workspace, synthetic.Silent(), workers=1)


def begin(place, dtype, acts, lengths, kept, criteria, **written):
    workspace = open_workspace(place)
    prepared = rolling_study(acts, dtype, lengths, kept, criteria)
    return Roll(
        workspace,
        prepared,
        synthetic.begin_capture(prepared, workspace, acts, lengths=lengths, **written),
        acts,
        lengths,
    )


def assert_same_summaries(one, other):
    """Bit for bit, the float moments and the second look too."""
    a, b = read_summary(one), read_summary(other)
    same_bits(a, b)
    for site in a.frame.sites:
        assert a.sites[site].moments.tobytes() == b.sites[site].moments.tobytes()
    for name in ("fine", "fine_windows"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
    for mine, theirs in zip(read_counts(one, a.frame), read_counts(other, b.frame), strict=True):
        assert_same_counts(mine, theirs)


@settings(max_examples=30, deadline=None)
@given(captures(), st.data())
def test_any_windows_and_kills_give_the_bits_of_one_count(capture, data):
    dtype, acts, _, lengths = capture
    criteria = {"ladder": LADDER, "site": "block" if "attn_in" in acts else next(iter(acts))}
    kept = data.draw(st.integers(1, len(lengths)))
    written = {
        "chunk_bytes": data.draw(st.sampled_from([100, 1 << 23])),
        "codec": data.draw(st.sampled_from(["none", "zstd"])),
    }
    with tempfile.TemporaryDirectory() as place:
        whole = counted_at_once(
            Path(place) / "whole", dtype, acts, lengths, criteria, chunk_bytes=written["chunk_bytes"]
        )
        roll = begin(Path(place) / "rolling", dtype, acts, lengths, kept, criteria, **written)
        sizes, widest = st.integers(1, len(lengths)), 1
        for _ in range(data.draw(st.integers(0, 4))):
            left, size = data.draw(st.integers(0, 12)), data.draw(sizes)
            widest = max(widest, size)
            countdown = iter([False] * left + [True] * 1000)
            if roll.run(size, lambda point, countdown=countdown: next(countdown)):
                break
        assert roll.run(data.draw(sizes))
        folder = place_summary(roll.prepared, roll.workspace, roll.layout, roll.wanted)
        assert_same_summaries(whole, folder)
        assert is_counted(roll.prepared, roll.journal(), roll.wanted, roll.folder)
        assert roll.sequences_there() == set(range(kept)) == set(roll.journal().done)
        # nothing but the last summary and the counts
        assert {path.name for path in (roll.folder / "rolling").glob("*/*")} == {"sequences", f"{DONE}-{len(lengths)}"}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_every_point_loses_and_leaks_nothing(tmp_path, point):
    rng = np.random.default_rng(3)
    acts = {
        site: synthetic.store(rng.standard_normal((2, 7, 5, 8)) * 4, "bfloat16")[0] for site in ("attn_in", "mlp_in")
    }
    whole = counted_at_once(tmp_path / "whole", "bfloat16", acts, None, {"magnitude": 3.0})
    times = 0
    while True:
        times += 1
        roll = begin(tmp_path / f"{times}", "bfloat16", acts, None, 1, {"magnitude": 3.0})
        countdown = iter([False] * (times - 1) + [True] * 99)
        ended = roll.run(2, lambda name, countdown=countdown: name == point and next(countdown))
        assert roll.run(2)
        assert_same_summaries(whole, place_summary(roll.prepared, roll.workspace, roll.layout, roll.wanted))
        assert roll.sequences_there() == {0}
        assert roll.most <= 1 + 2 + 2 * (point == "freeing")  # those that stay, and a window
        assert sorted(roll.captured) == list(range(7))  # a window that was captured is not captured again
        if ended:
            break
    assert times > 3


def drifting(seed=0):
    """float32 values at resid whose medians move from window to window, with massive ones near 1,000 times the median."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 8, 40, 16)) * np.linspace(0.5, 2.5, 8)[:, None, None]
    for layer in range(2):
        median = np.median(np.abs(values[layer]))
        near = 1000 * median * rng.uniform(0.99, 1.01, (8, 40))
        chosen = rng.random((8, 40)) < 0.2
        values[layer, ..., 3][chosen] = near[chosen]
    return {"resid": values.astype(np.float32)}


def test_a_median_that_moves_is_read_a_second_time(tmp_path, monkeypatch):
    """The first windows know other medians than the whole: the sequences that are freed are captured once more."""
    import outliers.counting.second_look as look

    acts = drifting()
    whole = counted_at_once(tmp_path / "whole", "float32", acts, None, {"site": "resid"})
    monkeypatch.setattr(look, "ROLLING_VALUES", 8)
    roll = begin(tmp_path / "rolling", "float32", acts, None, 2, {"site": "resid"})
    killed = iter([False] * 19 + [True] * 99)
    while not roll.run(2, lambda point: next(killed, False)):
        pass
    assert LOOK in roll.phases
    assert_same_summaries(whole, place_summary(roll.prepared, roll.workspace, roll.layout, roll.wanted))
    # of the sequences that stay nothing is captured again
    assert sorted(roll.captured) == [0, 1, *(s for s in range(2, 8) for _ in range(2))]


def test_a_median_that_stays_is_read_once(tmp_path):
    acts = drifting()
    whole = counted_at_once(tmp_path / "whole", "float32", acts, None, {"site": "resid"})
    roll = begin(tmp_path / "rolling", "float32", acts, None, 2, {"site": "resid"})
    assert roll.run(3)
    assert LOOK not in roll.phases
    assert_same_summaries(whole, place_summary(roll.prepared, roll.workspace, roll.layout, roll.wanted))


@pytest.fixture
def small(tmp_path):
    """A roll of six sequences, one of which stays, and the summary of one count."""
    values = np.random.default_rng(5).standard_normal((2, 6, 4, 8)) * 4
    acts = {"attn_in": synthetic.store(values, "float16")[0]}
    whole = counted_at_once(tmp_path / "whole", "float16", acts, None, {"magnitude": 3.0})
    return begin(tmp_path / "rolling", "float16", acts, None, 1, {"magnitude": 3.0}), whole


def test_a_summary_that_changed_is_not_gone_on_with(small, caplog):
    roll, whole = small
    countdown = iter([False] * 2 + [True] * 99)
    assert not roll.run(2, lambda point: point == "freed" and next(countdown))
    (totals,) = (roll.folder / "rolling").glob("*/*/totals.npz")
    content = bytearray(totals.read_bytes())
    content[len(content) // 2] ^= 1
    totals.write_bytes(content)
    assert roll.run(2)
    assert "counted anew" in caplog.text
    assert sorted(roll.captured) == [0, *(s for s in range(1, 6) for _ in range(2))]
    assert_same_summaries(whole, place_summary(roll.prepared, roll.workspace, roll.layout, roll.wanted))


def test_counts_that_are_gone_are_refused(small):
    roll, _ = small
    assert roll.run(2)
    shutil.move(next((roll.folder / "rolling").glob("*/sequences/2.npz")), roll.folder / "elsewhere")
    with pytest.raises(CorruptCapture, match=r"the counts of 4 of 6 sequences"):
        place_summary(roll.prepared, roll.workspace, roll.layout, roll.wanted)


def test_a_complete_capture_is_counted_as_it_is(small, caplog):
    roll, _ = small
    journal = roll.journal()
    synthetic.write_sequences(roll.prepared, roll.workspace, roll.layout, journal, roll.acts, roll.wanted)
    caplog.set_level("INFO")
    corpus = load_corpus(roll.prepared.corpus, roll.workspace)
    args = (roll.prepared, roll.workspace, synthetic.Silent(), roll.wanted, corpus, roll.layout, roll.journal())
    assert open_windows(*args) is None
    assert "nothing of it is freed" in caplog.text
    assert roll.sequences_there() == set(range(6))


def test_another_study_captures_again_what_one_has_freed(small, caplog):
    roll, whole = small
    assert roll.run(2)
    other = roll.prepared.model_copy(update={"study_id": "f" * 16})
    second = Roll(roll.workspace, other, roll.layout, roll.acts, None)
    caplog.set_level("INFO")
    assert second.run(3)
    assert "5 of 6 sequences were counted for another study and freed" in caplog.text
    assert second.captured == [1, 2, 3, 4, 5]
    # both are counted, and each is there once
    for prepared in (roll.prepared, other):
        assert is_counted(prepared, roll.journal(), roll.wanted, roll.folder)
    assert_same_summaries(whole, place_summary(roll.prepared, roll.workspace, roll.layout, roll.wanted))
    assert roll.sequences_there() == {0}
    assert len(roll.journal().path.read_text().splitlines()) == 1 + 2
