"""Errors of formats from a capture, against an oracle that reads the same values one at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from outliers.counting.analyze import analyze
from outliers.errors import CaptureError, CorruptCapture
from outliers.quantization.measure import measure_formats
from outliers.quantization.variants import formats_at, spread_evenly
from outliers.results.format_errors import errors_table, has_errors, read_errors
from outliers.results.schema import QUANTIZATION_SCHEMA
from outliers.steps import run_analyze, run_state
from outliers.workspace import open_workspace
from tests.support import synthetic
from tests.support.format_oracle import hadamard, quantize_row

FORMATS = ("int8_token", "int8_tensor", "int8_channel", "fp8_tensor", "mxfp4_even", "nvfp4")


def made(
    tmp_path, *, dtype="bfloat16", sites=("attn_in", "mlp_in", "resid"), sequences=5, formats=FORMATS, tokens=40, **more
):
    """A capture of 2 layers with two systematic features, 3 everywhere and 5 at first tokens alone, and a NaN."""
    rng = np.random.default_rng(7)
    acts, exact = {}, {}
    for site in sites:
        values = rng.standard_normal((2, sequences, 12, 48 if site == "resid" else 40)).astype(np.float32)
        values[:, :, :, 3] = 20 + rng.random((2, sequences, 12))
        values[:, :, 0, 5] = 300
        values[1, sequences - 1, 4, 7] = np.nan
        acts[site], exact[site] = synthetic.store(values, dtype)
    lengths = [12, 7, 12, 1, 9][:sequences]
    spec = {"formats": {"formats": formats, "format_tokens": tokens}} | more
    prepared = synthetic.prepared_for(acts, dtype, lengths=lengths, **spec)
    workspace = open_workspace(tmp_path / "workspace")
    synthetic.write_capture(prepared, workspace, acts, lengths=lengths, chunk_bytes=5 * 48 * 4)
    return prepared, workspace, exact, lengths


def table_of(prepared, workspace, **options):
    analyze(prepared, workspace, synthetic.Silent())
    measure_formats(prepared, workspace, synthetic.Silent(), **options)
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    return errors_table(read_errors(private, prepared))


def oracle(values, lengths, sample, fmt, held, ranged):
    """(tokens, squares, errors) of one site and layer; values: (sequence, position, feature) float64."""
    block, _, base = fmt.rpartition("+")
    size = int(block.removeprefix("had")) if block else 0
    matrix = np.kron(np.eye(values.shape[-1] // size), hadamard(size)) if size else np.eye(values.shape[-1])
    tokens = [
        (sequence, position)
        for sequence, length in enumerate(lengths)
        for position in range(length)
        if np.isfinite(values[sequence, position]).all()
    ]
    turned = {at: np.where(held, 0.0, values[at]) @ matrix for at in tokens}
    known = [np.abs(row) for at, row in turned.items() if ranged == "all" or at[1] > 0]
    if ranged == "all" and not size:  # the summary's: of every finite value, also those of a token with one that is not
        every = [np.abs(values[n, p]) for n, length in enumerate(lengths) for p in range(length)]
        known = [np.where(np.isfinite(row) & ~held, row, 0.0) for row in every]
    amax = np.max(known, axis=0)
    amax = amax if base == "int8_channel" else float(amax.max())
    count, squares, errors = 0, 0.0, 0.0
    for at in tokens:
        if at[0] in sample:
            quantized = quantize_row(turned[at].astype(np.float32), base, amax).astype(np.float64) @ matrix
            errors += float((((quantized - values[at]) ** 2)[~held]).sum())
            squares += float((values[at] ** 2).sum())
            count += 1
    return count, squares, errors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_table_equals_an_oracle_row_by_row(tmp_path, dtype):
    prepared, workspace, exact, lengths = made(tmp_path, dtype=dtype)
    rows = table_of(prepared, workspace).to_pylist()
    sample = set(spread_evenly(np.array(lengths), 40).tolist())
    assert len(sample) >= 2 and sum(lengths[n] for n in sample) <= 40
    keys = {(row["site"], row["layer"], row["format"], row["held_out"], row["range"]) for row in rows}
    names = {row["format"] for row in rows if row["site"] == "resid"}
    assert names == {*FORMATS, "had16+mxfp4_even", "had16+nvfp4"}
    assert {row["format"] for row in rows if row["site"] == "attn_in"} == set(FORMATS)  # 40 features: no block fits
    assert len(keys) == len(rows) and {row["held_out"] for row in rows} == {0, 2}
    for row in rows:
        values = exact[row["site"]][row["layer"]]
        held = np.zeros(values.shape[-1], np.bool_)
        held[[3, 5]] = row["held_out"] == 2
        count, squares, errors = oracle(values, lengths, sample, row["format"], held, row["range"])
        assert row["tokens"] == count
        assert math.isclose(row["squared_norm"], squares, rel_tol=1e-12)
        close = 1e-4 if "had" in row["format"] else 1e-12  # the oracle rotates in float64
        assert math.isclose(row["squared_error"], errors, rel_tol=close), row
        assert math.isclose(row["relative_error"], row["squared_error"] / row["squared_norm"], rel_tol=1e-12)
        assert row["sqnr_db"] == pytest.approx(-10 * math.log10(row["relative_error"]), abs=1e-6)
        assert row["relative_error_low"] <= row["relative_error"] <= row["relative_error_high"]
        assert row["sqnr_db_low"] <= row["sqnr_db"] <= row["sqnr_db_high"]


def test_what_the_rows_say(tmp_path):
    prepared, workspace, _, _ = made(tmp_path)
    table = table_of(prepared, workspace)
    assert table.schema.equals(QUANTIZATION_SCHEMA)
    rows = {
        (r["site"], r["layer"], r["format"], r["held_out"], r["range"]): r["squared_error"] for r in table.to_pylist()
    }
    place = ("attn_in", 0)
    # a range that leaves out the first tokens clips them; a smaller step helps all others
    assert rows[*place, "int8_tensor", 0, "without_first_tokens"] != rows[*place, "int8_tensor", 0, "all"]
    assert rows[*place, "int8_token", 2, None] < rows[*place, "int8_token", 0, None]
    assert (*place, "nvfp4", 0, "without_first_tokens") not in rows


def test_the_same_bits_for_any_number_of_threads_and_any_tiles(tmp_path, monkeypatch):
    prepared, workspace, _, _ = made(tmp_path)
    wanted = table_of(prepared, workspace, workers=1)
    assert table_of(prepared, workspace, workers=3).equals(wanted)
    monkeypatch.setattr("outliers.quantization.measure.TILE_BYTES", 1)
    assert table_of(prepared, workspace, workers=2).equals(wanted)


def test_one_sequence_has_no_interval_and_a_first_token_alone_no_other_range(tmp_path):
    prepared, workspace, exact, _ = made(tmp_path, sites=("mlp_in",), sequences=1)
    rows = table_of(prepared, workspace).to_pylist()
    assert all(row["relative_error_low"] is None and row["sqnr_db_high"] is None for row in rows)
    acts = {"mlp_in": synthetic.store(exact["mlp_in"][:, :, :2], "bfloat16")[0]}
    alone = synthetic.prepared_for(acts, "bfloat16", lengths=[1], formats={"formats": FORMATS})
    synthetic.write_capture(alone, workspace, acts, lengths=[1])
    assert {row["range"] for row in table_of(alone, workspace).to_pylist()} == {None, "all"}


@pytest.mark.parametrize(
    ("lengths", "most", "wanted"),
    [
        ([10] * 8, 80, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([10] * 8, 40, [0, 2, 4, 6]),
        ([10] * 8, 39, [0, 2, 5]),
        ([10] * 8, 1, [0, 4]),  # two, whatever they have
        ([10], 1, [0]),
        ([100, 1, 1, 1, 1, 1], 50, [0, 3]),
    ],
)
def test_the_sample_is_spread_evenly_and_holds_whole_sequences(lengths, most, wanted):
    assert spread_evenly(np.array(lengths), most).tolist() == wanted


def test_a_rotation_is_added_beside_a_4_bit_format_where_one_fits():
    def names(*asked, width):
        return [fmt.name for fmt in formats_at(asked, width)]

    assert names("int8_token", "nvfp4", width=576) == ["int8_token", "nvfp4", "had64+nvfp4"]
    assert names("int4_token", "mxfp4_floor", width=96) == [
        "int4_token",
        "had32+int4_token",
        "mxfp4_floor",
        "had32+mxfp4_floor",
    ]
    assert names("nvfp4", "had64+nvfp4", width=64) == ["nvfp4", "had64+nvfp4"]
    assert names("nvfp4", width=40) == ["nvfp4"]


def test_the_step_measures_once_and_again_where_it_was_ended_between(tmp_path, monkeypatch):
    prepared, workspace, _, _ = made(tmp_path)
    run_analyze(prepared, workspace, synthetic.Silent())
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    wanted = errors_table(read_errors(private, prepared))
    assert run_state(prepared, workspace, synthetic.Silent())["summary"]
    (private / "formats" / "checksums.json").unlink()
    assert not has_errors(private) and not run_state(prepared, workspace, synthetic.Silent())["summary"]
    monkeypatch.setattr("outliers.counting.analyze.analyze", None)  # counted: that is not done again
    run_analyze(prepared, workspace, synthetic.Silent())
    assert errors_table(read_errors(private, prepared)).equals(wanted)


def test_what_can_not_be_measured_is_refused(tmp_path):
    prepared, workspace, _, _ = made(tmp_path)
    with pytest.raises(CaptureError, match="analyze first"):
        measure_formats(prepared, workspace, synthetic.Silent())
    analyze(prepared, workspace, synthetic.Silent())
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    with pytest.raises(CaptureError, match="no errors of number formats"):
        read_errors(private, prepared)
    chunk = next(workspace.capture(prepared.capture_id).glob("activations.zarr/mlp_in/c.1.0.0.0"))
    content = bytearray(chunk.read_bytes())
    content[9] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CorruptCapture, match="its bytes changed"):
        measure_formats(prepared, workspace, synthetic.Silent())
    assert not has_errors(private)


def test_sums_that_changed_on_disk_are_refused(tmp_path):
    prepared, workspace, _, _ = made(tmp_path)
    assert isinstance(table_of(prepared, workspace), pa.Table)
    path = workspace.summary(prepared.capture_id, prepared.study_id) / "formats" / "errors.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"\0\1")
    with pytest.raises(CorruptCapture, match="analyze again"):
        read_errors(path.parent.parent, prepared)
