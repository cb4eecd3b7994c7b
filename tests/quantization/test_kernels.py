"""The compiled loops against `emulate`: every bit of every row, and the sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.quantization.emulate import emulate, rotate
from outliers.quantization.kernels.rules import rotate_row
from outliers.quantization.kernels.tile import BFLOAT16, FLOAT16, FLOAT32, add_squares, open_tile, raise_ranges
from outliers.quantization.rules import Rule, padded
from outliers.spec.formats import BASES, parse_format
from tests.quantization.test_emulate import activations

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}


def opened(x):
    """(token, padded feature) float32, (token,) bool, by the loops from the bits of `x`."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).numpy()
    bits = bits.view(np.uint32 if x.dtype == torch.float32 else np.uint16)
    values, good = np.full((x.shape[0], padded(x.shape[1])), 7.0, np.float32), np.zeros(x.shape[0], np.bool_)
    measured = open_tile(bits, KINDS[x.dtype], values, good)
    assert measured == good.sum()
    return values, good


@st.composite
def cases(draw):
    """Values, features that are held out, and a rotation that fits; the last group may be shorter."""
    x = draw(activations(widths=(1, 15, 32, 50, 64, 96, 160)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    held = rng.random(x.shape[1]) < draw(st.sampled_from([0.0, 0.2]))
    block = draw(st.sampled_from([0, 0, 16, 32, 64]))
    return x, held, block if block and x.shape[1] % block == 0 else 0


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([1.0, 0.4]))
def test_rows_and_sums_are_those_of_emulate(case, share):
    x, held, block = case
    width, wide = x.shape[1], x.float()
    values, good = opened(x)
    assert good.all()
    assert np.array_equal(values[:, :width].view(np.int32), wide.numpy().view(np.int32))
    assert not values[:, width:].any()
    kept = np.ones(padded(width), np.float32)
    kept[:width][held] = 0
    scratch = np.empty((3, padded(width)), np.float32)
    without = rotate(torch.where(torch.from_numpy(held), 0.0, wide), block)
    largest = np.zeros(padded(width), np.float32)
    factor = np.float32(1 / np.sqrt(block)) if block else np.float32(1)
    raise_ranges(values, good, kept, width, block, factor, scratch, largest)
    assert np.array_equal(largest[:width], without.abs().amax(0).numpy())
    for base in BASES:
        fmt = parse_format(f"had{block}+{base}" if block else base)
        amax = (largest[:width] * np.float32(share)).astype(np.float32)
        rule = Rule.of(fmt, width, amax)
        given_range = torch.from_numpy(amax) if base == "int8_channel" else float(amax.max())
        wanted = emulate(wide, fmt, amax=given_range, held=torch.from_numpy(held)).numpy()
        errors = np.zeros(padded(width))
        rule.add_errors(values, good, kept, width, scratch, errors)
        exact = np.zeros(width)
        for token in range(x.shape[0]):
            row = values[token] * kept
            if block:
                rotate_row(row, width, block, factor, scratch[2])
            row = rule.quantized(row)
            if block:
                rotate_row(row, width, block, factor, scratch[2])
            assert np.array_equal(row[:width][~held], wanted[token][~held]), fmt
            difference = wanted[token].astype(np.float64) - wide[token].numpy().astype(np.float64)
            exact += difference * difference
        assert np.array_equal(errors[:width][~held], exact[~held]), fmt
    squares = np.zeros(padded(width))
    add_squares(values, good, squares)
    assert np.allclose(squares[:width], (wide.double() ** 2).sum(0).numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_with_a_value_that_is_not_finite_is_in_no_sum(dtype, bad):
    torch.manual_seed(0)
    x = torch.randn(5, 40).to(dtype)
    wanted, width = x.clone()[[0, 1, 3, 4]], 40
    x[2, 17] = bad
    values, good = opened(x)
    assert good.tolist() == [True, True, False, True, True]
    kept, scratch = np.ones(padded(width), np.float32), np.empty((3, padded(width)), np.float32)
    for base in BASES:
        rule = Rule.of(parse_format(base), width, np.full(width, 3.0, np.float32))
        errors, others = np.zeros(padded(width)), np.zeros(padded(width))
        rule.add_errors(values, good, kept, width, scratch, errors)
        rule.add_errors(*opened(wanted), kept, width, scratch, others)
        assert np.isfinite(errors).all() and np.array_equal(errors, others)
    largest, squares = np.zeros(padded(width), np.float32), np.zeros(padded(width))
    raise_ranges(values, good, kept, width, 0, np.float32(1), scratch, largest)
    add_squares(values, good, squares)
    assert np.array_equal(largest[:width], wanted.float().abs().amax(0).numpy())
    assert np.isfinite(squares).all()


def test_a_magnitude_that_could_leave_the_arithmetic_is_left_out():
    x = torch.ones(3, 32)
    x[0, 3], x[1, 3] = 2.0**100, -(2.0**99)
    assert opened(x)[1].tolist() == [False, True, True]
