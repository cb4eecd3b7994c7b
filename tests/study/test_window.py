"""How much of a capture is on the disk at once: against a count of files by loops."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outliers.spec import StudySpec
from outliers.study.layout import Layout
from outliers.study.window import freed_bytes, held_bytes, kept_sequences, window_sequences


def spec_of(sequences, batch, stored, window):
    capture = {"store": "rolling", "store_sequences": stored, "batch_sequences": batch, "disk_window": window}
    return StudySpec.model_validate({"model": "m", "corpus": {"num_sequences": sequences}, "capture": capture})


@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 50), st.none() | st.floats(1e-7, 1e-4), st.integers(0, 10**6)
)
def test_windows_are_whole_batches_within_what_was_asked(sequences, batch, stored, window, free):
    spec = spec_of(sequences, batch, stored, window)
    layout = Layout({"attn_in": 3, "mlp_in": 5}, (0, 1), sequences, 7, "float32", "none", chunk_bytes=40)
    one = sum(2 * 4 * width * layout.chunk_positions * layout.position_chunks for width in (3, 5))
    assert freed_bytes(layout) == one
    taken, most = window_sequences(spec, layout, free), free / 10 if window is None else window * 1e9
    assert taken % batch == 0
    assert taken == batch or taken * one <= most
    assert (taken + batch) * one > most - 1
    kept = kept_sequences(spec)
    assert min(stored, sequences) <= kept <= sequences
    assert kept % batch == 0 or kept == sequences
    assert kept - stored < batch
    held = held_bytes(spec, layout, free)
    assert held == min(layout.total_bytes, layout.side_bytes + (kept + 2 * taken) * one)


def test_a_full_store_keeps_everything():
    spec = StudySpec.model_validate({"model": "m", "corpus": {"num_sequences": 9}})
    layout = Layout({"attn_in": 3}, (0,), 9, 7, "bfloat16", "none")
    assert (kept_sequences(spec), held_bytes(spec, layout)) == (9, layout.total_bytes)
