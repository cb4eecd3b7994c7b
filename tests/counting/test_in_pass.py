"""Counting in the forward pass: every number is the brute-force oracle's, and bit for bit that of a stored capture."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.counting.in_pass.counter import BatchMarks
from outliers.counting.in_pass.device import DeviceCounter
from outliers.counting.in_pass.host import HostCounter
from outliers.errors import SiteError
from tests.counting.test_counting import same_bits
from tests.counting.test_properties import captures, check_summary, count
from tests.support.in_pass import feed, frame_and_shape

WAYS = {"host": HostCounter, "torch": DeviceCounter}


@settings(max_examples=60, deadline=None)
@given(
    captures(), st.sampled_from(["host", "torch"]), st.integers(1, 3), st.sampled_from([200, 4096, 1 << 23]), st.data()
)
def test_it_counts_what_a_stored_capture_counts(capture, way, batch, chunk_bytes, data):
    """Both ways, batches, spans, and an interruption after any batch: the oracle's numbers, and the stored Summary's bits."""
    dtype, acts, exact, lengths = capture
    stop = data.draw(st.integers(0, len(lengths)))
    with tempfile.TemporaryDirectory() as place:
        stored, stored_counts = count(Path(place), dtype, acts, lengths, chunk_bytes, 1)
    frame, shape = frame_and_shape(stored.frame, batch, chunk_bytes)
    summary, counts = feed(WAYS[way], frame, shape, acts, lengths, stop=stop)
    check_summary(summary, counts, exact, lengths, dtype)
    # a second look at a capture's float32 values is not this module's
    stored.fine, stored.fine_windows = summary.fine, summary.fine_windows
    same_bits(stored, summary)
    assert len(counts) == len(stored_counts)
    for one, other in zip(counts, stored_counts, strict=True):
        same_counts(one, other)


def same_counts(one, other):
    assert (one.sequence, one.tokens) == (other.sequence, other.tokens)
    for name in ("hooks", "legacy_union"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("hits", "union", "reach"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.keys() == theirs.keys()
        for site in mine:
            np.testing.assert_array_equal(mine[site], theirs[site])


def test_massive_values_come_with_the_median_of_their_token():
    rng = np.random.default_rng(5)
    values = rng.standard_normal((2, 3, 9, 12)).astype(np.float32)
    values[:, :, 2, 3] = 4000.0
    values[0, 1, 4, 5:9] = -130.0
    values[1, 0, 2] = np.nan
    values[1, 2, 7] = 500.0
    for dtype in ("bfloat16", "float16", "float32"):
        from tests.support import synthetic

        bits, _ = synthetic.store(values, dtype)
        with tempfile.TemporaryDirectory() as place:
            stored, _ = count(Path(place), dtype, {"resid": bits}, [9, 8, 9], 1 << 23, 1)
        for way in WAYS.values():
            frame, shape = frame_and_shape(stored.frame, 2, 1 << 23)
            summary, _ = feed(way, frame, shape, {"resid": bits}, [9, 8, 9])
            assert summary.massive.size > 10
            np.testing.assert_array_equal(summary.massive, stored.massive)
            np.testing.assert_array_equal(summary.massive_cells, stored.massive_cells)
            np.testing.assert_array_equal(summary.massive_by_token, stored.massive_by_token)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_one_tensor_for_both_sites_is_counted_twice(way):
    """A norm that feeds attention and MLP is submitted once."""
    rng = np.random.default_rng(1)
    from tests.support import synthetic

    values = (rng.standard_normal((2, 2, 6, 32)) * 4).astype(np.float32)
    values[0, 0, 1, 3] = np.inf
    bits, _ = synthetic.store(values, "bfloat16")
    both = {"attn_in": bits, "mlp_in": bits}
    with tempfile.TemporaryDirectory() as place:
        stored, _ = count(Path(place), "bfloat16", both, [6, 5], 1 << 23, 1)
    frame, shape = frame_and_shape(stored.frame, 2, 1 << 23, aliases={"mlp_in": "attn_in"})
    summary, _ = feed(WAYS[way], frame, shape, {"attn_in": bits}, [6, 5])
    same_bits(stored, summary)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_what_does_not_belong_to_the_batch_is_refused(way):
    frame, shape = frame_and_shape(None, 1, 1 << 23)
    marks = BatchMarks(range(1), (4,), lambda: np.zeros((1, 5, 4), np.bool_))
    good = torch.zeros((1, 4, 8), dtype=torch.bfloat16)
    with WAYS[way](frame, shape) as counter:
        counter.begin(marks)
        for site, layer, tensor, words in (
            ("resid", 0, good, "resid of layer 0 is not one of the counted"),
            ("attn_in", 9, good, "layer 9 is not one of the counted"),
            ("attn_in", 0, good[:, :3], r"came as \(1, 3, 8\)"),
            ("attn_in", 0, good.float(), "torch.float32"),
        ):
            with pytest.raises(SiteError, match=words):
                counter.submit((None, site, layer), tensor)
        counter.submit((None, "attn_in", 0), good)
        with pytest.raises(SiteError, match="came twice"):
            counter.submit((None, "attn_in", 0), good)
        with pytest.raises(SiteError, match="never came whole"):
            counter.end()


def test_an_error_of_a_thread_ends_the_pass():
    frame, shape = frame_and_shape(None, 1, 1 << 23)

    class Broken(HostCounter):
        def _count(self, *job):
            raise ValueError("broken")

    good = torch.zeros((1, 4, 8), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="broken"), Broken(frame, shape) as counter:
        counter.begin(BatchMarks(range(1), (4,), lambda: np.zeros((1, 5, 4), np.bool_)))
        for layer in range(2):
            for site in ("attn_in", "mlp_in"):
                counter.submit((None, site, layer), good)
        counter.end()
        counter.drain()


def test_a_tensor_may_change_once_it_was_submitted():
    frame, shape = frame_and_shape(None, 1, 1 << 23)
    for way in WAYS.values():
        found = []
        for overwrite in (False, True):
            with way(frame, shape) as counter:
                counter.begin(BatchMarks(range(1), (4,), lambda: np.zeros((1, 5, 4), np.bool_)))
                for layer in range(2):
                    for site in ("attn_in", "mlp_in"):
                        tensor = torch.full((1, 4, 8), 7.0, dtype=torch.bfloat16)
                        counter.submit((None, site, layer), tensor)
                        if overwrite:
                            tensor.fill_(50.0)
                counter.end()
                found.append(counter.drain())
        same_bits(*found)


def test_two_devices_share_a_model():
    """Layers on another device have totals and keys there: torch's meta of a split, tried with two states on the processor."""
    rng = np.random.default_rng(3)
    from tests.support import synthetic

    acts = {}
    for site in ("attn_in", "mlp_in", "resid"):
        acts[site], _ = synthetic.store((rng.standard_normal((3, 3, 7, 33)) * 5).astype(np.float32), "float16")

    class Split(DeviceCounter):
        def _count(self, index, layer, tensors, batch):
            mine, other = self._states, self.__dict__.setdefault("other", {})
            if layer != 1:
                super()._count(index, layer, tensors, batch)
                return
            self._states = other
            super()._count(index, layer, tensors, batch)
            self._states = mine
            mine[torch.device("cpu", 1)] = next(iter(other.values()))

    with tempfile.TemporaryDirectory() as place:
        stored, stored_counts = count(Path(place), "float16", acts, [7, 3, 7], 1 << 23, 1)
    frame, shape = frame_and_shape(stored.frame, 2, 1 << 23)
    summary, counts = feed(Split, frame, shape, acts, [7, 3, 7])
    same_bits(stored, summary)
    for one, other in zip(counts, stored_counts, strict=True):
        same_counts(one, other)
