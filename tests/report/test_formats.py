"""Number formats on the page and at the terminal, from the rows of quantization.parquet."""

from __future__ import annotations

import argparse
import contextlib
import io
import math

import pytest
from rich.console import Console

from flows.cli.run_show import show_command
from outliers.errors import BadInput
from outliers.publish.reporting import write_study
from outliers.report.formats import format_maps, format_rows
from outliers.results.format_lines import format_lines
from outliers.steps import run_analyze
from tests.quantization.test_measure import made
from tests.support import synthetic


def row(site, layer, name, error, *, held=0, ranged=None, norm=100.0):
    share = error / norm
    decibels = -10 * math.log10(share) if share else None
    return {"site": site, "layer": layer, "format": name, "held_out": held, "range": ranged} | {
        "squared_norm": norm,
        "squared_error": error,
        "relative_error": share,
        "sqnr_db": decibels,
    }


ROWS = [
    row("mlp_in", 0, "nvfp4", 1.0, ranged="all"),
    row("mlp_in", 1, "nvfp4", 10.0, ranged="all"),
    row("mlp_in", 0, "nvfp4", 0.5, ranged="all", held=3),
    row("mlp_in", 1, "nvfp4", 0.0, ranged="all", held=3),
    row("attn_in", 0, "nvfp4", 0.0, ranged="all"),
    row("attn_in", 1, "nvfp4", 0.0, ranged="all"),
]


def test_lines_are_sums_over_layers_and_name_the_worst():
    first, held, exact = format_lines(ROWS)
    assert (first.site, first.format, first.held_out, first.range) == ("mlp_in", "nvfp4", 0, "all")
    assert first.sqnr_db == pytest.approx(-10 * math.log10(11 / 200))  # no mean of decibels
    assert (first.worst_layer, first.worst_db) == (1, pytest.approx(10.0))
    assert (held.held_out, held.worst_layer) == (3, 0)
    assert (exact.site, exact.sqnr_db, exact.worst_db) == ("attn_in", None, None)
    assert [line.worst_layer for line in format_lines(ROWS, site="mlp_in", layer=1)] == [1, 1]


def test_the_page_has_a_row_a_format_and_range():
    plain, held = format_rows(ROWS)
    assert (plain.name, plain.range, plain.held_out) == ("nvfp4", "whole corpus", "")
    assert plain.decibels == ("exact", "12.6")  # attn_in, mlp_in: in the order of the model
    assert plain.worst == "mlp_in 1: 10.0"
    assert (held.held_out, held.decibels) == ("3", ("–", "26.0"))


def test_the_maps_have_a_panel_a_format():
    plot = format_maps("tiny", (0, 1), ROWS)
    assert plot.name == "formats.png" and plot.png.startswith(b"\x89PNG")
    assert plot.alt == "Heat maps of 1 number formats over 2 layers: SQNR from 10.0 to 20.0 dB."
    assert format_maps("tiny", (0, 1), []) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    prepared, workspace, _, _ = made(tmp_path_factory.mktemp("page"), formats=("int8_tensor", "nvfp4"))
    run_analyze(prepared, workspace, synthetic.Silent())
    write_study(prepared, workspace, synthetic.Silent())
    return prepared, workspace


def shown(workspace, **options):
    out = io.StringIO()
    asked = {"run": None, "json": False, "site": None, "layer": None, "feature": None, "formats": True} | options
    with contextlib.redirect_stdout(out):
        show_command(workspace, argparse.Namespace(**asked), Console(stderr=True))
    return out.getvalue()


def test_a_finished_study_shows_them(finished):
    prepared, workspace = finished
    folder = workspace.study(prepared.study_id)
    assert {"quantization.parquet", "plots/formats.png"} <= {str(p.relative_to(folder)) for p in folder.rglob("*")}
    page = (folder / "report.html").read_text()
    assert '<h2 id="formats">Number formats</h2>' in page and "without first tokens" in page and "had16+nvfp4" in page
    text = shown(workspace)
    assert "SQNR in dB over 32 tokens in 4 sequences" in text
    assert "had16+nvfp4" in text and "no first tokens" in text
    assert "attn_in" not in shown(workspace, site="resid")


def test_a_study_without_formats_says_how_to_get_them(tmp_path):
    prepared, workspace, _, _ = made(tmp_path, formats=())
    run_analyze(prepared, workspace, synthetic.Silent())
    write_study(prepared, workspace, synthetic.Silent())
    assert not (workspace.study(prepared.study_id) / "quantization.parquet").exists()
    assert "Number formats" not in (workspace.study(prepared.study_id) / "report.html").read_text()
    with pytest.raises(BadInput, match="has no number formats: run it with --formats"):
        shown(workspace)
