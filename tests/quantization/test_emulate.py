"""Number formats as functions of tensors, against compressed-tensors and an oracle that looks values up in tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.errors import BadInput
from outliers.quantization.emulate import emulate, emulate_weight, rotate, round_e2m1, round_e4m3
from outliers.spec.formats import BASES, STATIC, parse_format
from tests.support.format_oracle import E2M1, E4M3, hadamard, nearest, quantize_row

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LIBRARY = {
    "int8_token": QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True),
    "int4_token": QuantizationArgs(num_bits=4, type="int", strategy="token", dynamic=True),
    "fp8_token": QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True),
    "int8_tensor": QuantizationArgs(num_bits=8, type="int", strategy="tensor"),
    "int8_channel": QuantizationArgs(num_bits=8, type="int", strategy="channel"),
    "fp8_tensor": QuantizationArgs(num_bits=8, type="float", strategy="tensor"),
    "mxfp4_even": PRESET_SCHEMES["MXFP4"]["input_activations"],
    "mxfp8_rceil": PRESET_SCHEMES["MXFP8"]["input_activations"],
    "nvfp4": PRESET_SCHEMES["NVFP4"]["input_activations"],
}
"""The library's own arguments for a format; it has no rule that is mxfp4_floor or mxfp8_floor."""


@st.composite
def activations(draw, widths=(32, 64, 96, 160)):
    """(token, feature) as a model gives them: outliers, zeros of both signs, groups of zeros, tiny and subnormal values, ties."""
    width = draw(st.sampled_from(widths))
    tokens = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1e-3, 30.0, 1e-7, 1e-38, 3e-42, 1e4]))
    values = rng.standard_normal((tokens, width)) * scale
    values[rng.random(values.shape) < 0.05] = 0.0
    values[rng.random(values.shape) < 0.05] = -0.0
    values[:, rng.random(width) < 0.05] *= 40
    values[rng.random(tokens) < 0.1] = 0.0
    values[:, : width // 2 // 16 * 16][rng.random(tokens) < 0.2] = 0.0
    ties = rng.random(values.shape) < draw(st.sampled_from([0.0, 0.3]))
    values[ties] = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 448.0, 127.5, -7.5], ties.sum()) * scale
    name = draw(st.sampled_from(sorted(DTYPES)))
    return torch.tensor(values, dtype=torch.float32).clamp(-6e4, 6e4).to(DTYPES[name])


def amax_of(x, base):
    """The range of a tensor as a static format takes it."""
    if base == "int8_channel":
        return x.float().abs().amax(0)
    return float(x.float().abs().max()) if base in STATIC else None


def by_library(x, base):
    """What compressed-tensors gives for float32 `x` (token, feature), with the range of `x`; it wants a batch in front."""
    args, low, high = LIBRARY[base], x.min(), x.max()
    overall = generate_gparam(low, high) if base == "nvfp4" else None
    if base in ("int8_tensor", "fp8_tensor"):
        scale, zero = calculate_qparams(low, high, args)
    elif base == "int8_channel":
        scale, zero = calculate_qparams(x.amin(0), x.amax(0), args)
    else:
        scale, zero = compute_dynamic_scales_and_zp(x[None], args, None, global_scale=overall)
    return fake_quantize(x[None].clone(), scale, zero, args, global_scale=overall)[0]


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@settings(max_examples=60, deadline=None)
@given(activations())
def test_every_format_that_the_library_has_is_equal_to_it_bit_by_bit(x):
    x = x.float()
    for base in LIBRARY:
        got, wanted = emulate(x, parse_format(base), amax=amax_of(x, base)), by_library(x, base)
        if base == "mxfp8_rceil":
            # at 1.75 times a power of two the library goes to the next power, where ceil(log2(amax / 448)) stays
            exact = torch.frexp(x.unflatten(-1, (-1, 32)).abs().amax(-1)).mantissa == 0.875
            others = ~exact.repeat_interleave(32, dim=-1)
            got, wanted = torch.where(others, got, 0.0), torch.where(others, wanted, 0.0)
        assert same_bits(got, wanted), base


@settings(max_examples=25, deadline=None)
@given(activations(widths=(1, 15, 16, 33, 50, 64)), st.floats(0.3, 1.5))
def test_every_format_equals_a_search_in_tables(x, share):
    for base in BASES:
        amax = amax_of(x, base)
        amax = None if amax is None else amax * share  # values beyond the range, and a range that is not reached
        got = emulate(x.float(), parse_format(base), amax=amax)
        plain = amax.numpy() if isinstance(amax, torch.Tensor) else amax
        wanted = np.stack([quantize_row(row, base, plain) for row in x.float().numpy()])
        assert np.array_equal(got.numpy(), wanted), base
        own = emulate(x, parse_format(base), amax=amax)
        assert own.dtype == x.dtype
        most = torch.finfo(x.dtype).max
        assert torch.equal(own, torch.from_numpy(wanted).clamp(-most, most).to(x.dtype)), base


def test_the_two_elements_round_as_a_search_and_as_torch_does():
    grid = torch.arange(0, 0x44000000, 0x1357, dtype=torch.int32).view(torch.float32)  # 0 to 512, subnormals too
    halves = torch.tensor([(a + b) / 2 for table in (E4M3, E2M1) for a, b in itertools.pairwise(table)])
    values = torch.cat([grid, halves, torch.tensor([448.0, 463.9, 1e9, 5.0, 6.0, 7.0])])
    for x in (values, -values):
        assert same_bits(round_e4m3(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    for x in halves.tolist():
        assert float(round_e4m3(torch.tensor(x))) == nearest(x, E4M3)
        assert float(round_e2m1(torch.tensor(x))) == nearest(x, E2M1)


@settings(max_examples=30, deadline=None)
@given(activations(widths=(64, 128)), st.sampled_from([16, 32, 64]))
def test_rotation_is_the_hadamard_matrix_before_and_after(x, block):
    x = x.float()
    turned = (x.double().unflatten(-1, (-1, block)) @ torch.from_numpy(hadamard(block))).flatten(-2)
    size = float(x.abs().max())
    assert torch.allclose(rotate(x, block).double(), turned, rtol=0, atol=size * 1e-5 + 1e-44)
    for base in BASES:
        amax = amax_of(rotate(x, block), base)
        got = emulate(x, parse_format(f"had{block}+{base}"), amax=amax)
        assert torch.equal(got, rotate(emulate(rotate(x, block), parse_format(base), amax=amax), block)), base


@settings(max_examples=30, deadline=None)
@given(activations(widths=(64, 96)), st.integers(0, 2**32 - 1), st.sampled_from(["", "had16+", "had32+"]))
def test_held_features_stay_and_the_others_are_quantized_as_if_they_were_zero(x, seed, rotation):
    held = torch.from_numpy(np.random.default_rng(seed).random(x.shape[-1]) < 0.2)
    without = torch.where(held, torch.zeros_like(x), x)
    for base in BASES:
        fmt = parse_format(rotation + base)
        amax = amax_of(rotate(without.float(), fmt.rotation), base)
        got = emulate(x, fmt, amax=amax, held=held)
        assert torch.equal(got[:, held], x[:, held])
        assert torch.equal(got[:, ~held], emulate(without, fmt, amax=amax)[:, ~held]), fmt


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [*BASES, "had16+int4_token", "had32+nvfp4"])
def test_a_token_with_a_value_that_is_not_finite_is_nan_and_changes_no_other(name, bad):
    torch.manual_seed(0)
    x, fmt = torch.randn(2, 4, 64), parse_format(name)
    amax = torch.full((64,), 3.0) if fmt.base == "int8_channel" else 3.0
    wanted = emulate(x, fmt, amax=amax)
    x[1, 2, 5] = bad
    held = torch.zeros(64, dtype=torch.bool)
    held[5] = True
    assert emulate(x, fmt, amax=amax)[1, 2].isnan().all()
    assert emulate(x, fmt, amax=amax, held=held)[1, 2].isnan().all()
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(emulate(x, fmt, amax=amax)[others], wanted[others])


@settings(max_examples=25, deadline=None)
@given(activations(widths=(32, 64)))
def test_a_weight_has_a_scale_a_row_or_its_own_largest_magnitude(w):
    for base in BASES:
        for fmt in (parse_format(base), parse_format(f"had16+{base}")):
            turned = rotate(w.float(), fmt.rotation)
            if base in ("int8_tensor", "fp8_tensor", "nvfp4"):
                wanted = emulate(w, fmt, amax=turned.abs().max())
            else:
                wanted = emulate(w, parse_format(fmt.name.replace("channel", "token")))
            assert torch.equal(emulate_weight(w, fmt), wanted), fmt


# what is asked, and what the refusal says
REFUSED = [
    ("nvfp4", {}, "nvfp4 is static: its scale needs amax"),
    ("int8_channel", {"amax": 3.0}, "amax of int8_channel has the shape (48,), not ()"),
    ("int8_tensor", {"amax": torch.ones(48)}, "amax of int8_tensor has the shape (), not (48,)"),
    ("fp8_tensor", {"amax": float("nan")}, "a finite magnitude, not negative: [nan]"),
    ("fp8_tensor", {"amax": -1.0}, "a finite magnitude, not negative: [-1.0]"),
    ("had32+int8_token", {}, "had32+int8_token rotates blocks of 32 features, and 48 is not a multiple of it"),
    (
        "int8_token",
        {"held": torch.zeros(47, dtype=torch.bool)},
        "held features are bool of shape (48,), not torch.bool of (47,)",
    ),
    ("int8_token", {"held": torch.zeros(48)}, "held features are bool of shape (48,), not torch.float32 of (48,)"),
]


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_what_does_not_fit_is_refused(name, options, said):
    with pytest.raises(BadInput) as refused:
        emulate(torch.ones(2, 48), parse_format(name), **options)
    assert said in str(refused.value)


def test_integers_and_weights_of_another_shape_are_refused():
    with pytest.raises(BadInput, match=r"quantizes floating point values, this is torch\.int64"):
        emulate(torch.ones(2, 16, dtype=torch.int64), parse_format("int8_token"))
    with pytest.raises(BadInput, match=r"shape \(out, in\), this one \(2, 3, 4\)"):
        emulate_weight(torch.ones(2, 3, 4), parse_format("int8_token"))


def test_nothing_is_quantized_to_nothing():
    for base in BASES:
        amax = torch.ones(32) if base == "int8_channel" else 1.0
        for name in (base, f"had16+{base}"):
            assert emulate(torch.ones(0, 32), parse_format(name), amax=amax).shape == (0, 32)
    assert emulate_weight(torch.ones(0, 32), parse_format("nvfp4")).shape == (0, 32)
