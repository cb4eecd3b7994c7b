"""The face in Python: its names, a study in this process, results as frames, a capture as lazy arrays."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import zarr

import outliers
from outliers import StudySpec, list_studies, open_capture, open_study, plan, run_study
from outliers.api import Study
from outliers.corpus.ids import lengths_hash, token_hash
from outliers.errors import BadInput, CaptureError, CorruptCapture, DamagedResults
from outliers.results.notes import ROWS_LEFT_OUT
from outliers.store.fingerprint import shapes_of, write_fingerprint
from tests.counting.test_counting import random_acts
from tests.support import synthetic, tiny

ROOT = Path(__file__).resolve().parents[2]


def test_the_names_are_there_and_cost_nothing_before_they_are_used():
    assert set(outliers.__all__) == {
        *("StudySpec", "plan", "run_study", "open_study", "open_capture", "list_studies", "__version__")
    }
    assert all(getattr(outliers, name) for name in outliers.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'everything'"):
        outliers.everything  # noqa: B018
    script = "import outliers, sys; print(sorted(m for m in sys.modules if m.startswith(('outliers.', 'numpy', 'pydantic'))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['outliers.version']"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def made(home, text):
    """A study of bfloat16 with four sites, of which o_in is wider, run in this process and published."""
    model = tiny.make_model(home / "model", "Qwen3", dtype="bfloat16")
    parts = {"capture": {"sites": ["attn_in", "mlp_in", "o_in", "resid"]}, "publish_to": f"file://{home}/store"}
    spec = StudySpec.model_validate(tiny.spec_for(model, text, **parts) | {"compute": {"workspace": str(home / "ws")}})
    return spec, run_study(spec, progress=False)


def test_a_study_runs_here_and_is_opened_at_once_the_second_time(made, home, capsys):
    spec, study = made
    again = run_study(spec)
    assert again.manifest == study.manifest
    assert capsys.readouterr().err == "", "nothing ran"
    arrays = [path for path in home.glob("ws/captures/*/activations.zarr/**/*") if path.is_file()]
    assert plan(spec).capture_bytes == sum(path.stat().st_size for path in arrays if path.name != "zarr.json")


def test_results_are_frames(made, home):
    _, study = made
    features = study.features()
    assert isinstance(features, pd.DataFrame) and isinstance(study.features("polars"), pl.DataFrame)
    assert study.features("arrow").to_pandas().equals(features)
    kept = json.loads((Path(study.place) / "summary.json").read_text())
    assert study.summary == kept
    assert list(study.systematic().feature) == [row["feature"] for row in kept["systematic"]] != []
    assert str(kept["systematic"][0]["feature"]) in study._repr_html_()
    (row,) = list_studies(home / "ws").to_dict("records")
    (published,) = list_studies(f"file://{home}/store", "polars").to_dicts()
    assert row["study_id"] == published["study_id"] == study.study_id
    for name in (study.study_id, study.study_id[:5], row["place"], published["place"]):
        assert open_study(name, home / "ws").features().equals(features), name
    with pytest.raises(BadInput, match="'excel' is not a kind of frame: pandas, polars or arrow"):
        study.features("excel")
    with pytest.raises(BadInput, match=r"no finished study 0000 in .*list_studies"):
        open_study("0000", home / "ws")


def test_a_capture_is_lazy_arrays_of_the_very_values(made, home):
    """Against zarr's own reading of the group, at indices of every kind."""
    _, study = made
    capture = open_capture(study.capture_id, home / "ws")
    group = zarr.open_group(str(home / "ws" / "captures" / study.capture_id / "activations.zarr"), mode="r")
    assert capture.o_in.dims == ("layer", "sequence", "position", "feature_o_in")
    for site in ("attn_in", "mlp_in", "o_in", "resid"):
        bits = group[dict(group.attrs.get("alias_of", {})).get(site, site)][:]
        whole = (bits.astype(np.uint32) << 16).view(np.float32)
        assert capture[site].dims[:3] == ("layer", "sequence", "position") and capture[site].dtype == np.float32
        lazy = capture[site].variable
        for key in (
            (slice(None),) * 4,
            (2, -1, slice(5, None, 3), 7),
            ([2, 0], slice(1, 3), [3, 3, 1], slice(None, None, -1)),
        ):
            expected = whole
            for axis, index in reversed(list(enumerate(key))):
                expected = expected.take(np.arange(whole.shape[axis])[index], axis)
            assert np.array_equal(lazy[key].values, expected, equal_nan=True), (site, key)
    both = capture[["attn_in", "mlp_in"]].to_dataarray("site")
    assert both.dims == ("site", "layer", "sequence", "position", "feature")
    assert np.array_equal(capture.token_id, group["token_ids"][:])


def test_what_is_damaged_is_not_read(made, home, tmp_path):
    spec, study = made
    capture = open_capture(study.capture_id, home / "ws")
    chunk = home / "ws" / "captures" / study.capture_id / "activations.zarr" / "mlp_in" / "c.1.2.0.0"
    before = chunk.read_bytes()
    summary = Path(study.place) / "summary.json"
    kept = summary.read_bytes()
    try:
        chunk.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert capture.mlp_in.isel(layer=0).values.size, "another layer is whole"
        with pytest.raises(CorruptCapture, match=re.escape(str(chunk))):
            capture.mlp_in.isel(feature=0).max().item()
        summary.write_bytes(kept.replace(b"1", b"2", 1))
        with pytest.raises(DamagedResults):
            open_study(study.study_id, home / "ws")
    finally:
        chunk.write_bytes(before)
        summary.write_bytes(kept)
    for update, said in (({"provider": "ssh", "host": "lab1"}, "provider ssh"), ({"shards": 2}, "2 shards")):
        elsewhere = spec.model_copy(update={"compute": spec.compute.model_copy(update=update)})
        with pytest.raises(BadInput, match=f"asks for a study .*{said}: run it with `outliers study`"):
            run_study(elsewhere)
    with pytest.raises(BadInput, match="there is no capture"):
        open_capture("abc", home / "ws")


def test_an_unfinished_capture_is_refused(made, home):
    _, study = made
    journal = home / "ws" / "captures" / study.capture_id / "journal.jsonl"
    before = journal.read_bytes()
    try:
        journal.write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))
        with pytest.raises(CaptureError, match="3 of 4 sequences: run its study again"):
            open_capture(study.capture_id, home / "ws")
    finally:
        journal.write_bytes(before)


def test_positions_past_the_end_of_a_sequence_are_nan(home, tmp_path, llama):
    """Documents of many lengths, padded: what is beyond `length` is no value."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in (3, 9, 2, 6)))
    corpus = {"source": str(tmp_path / "d.jsonl"), "num_sequences": 4, "sequence_length": 24, "packing": "documents"}
    spec = StudySpec.model_validate(
        {"model": str(llama), "corpus": corpus, "compute": {"workspace": str(tmp_path / "ws")}}
    )
    capture = open_capture(run_study(spec, progress=False).capture_id, tmp_path / "ws")
    there = np.isfinite(capture.mlp_in.values).all(axis=(0, 3))
    assert np.array_equal(there, np.arange(24) < capture.length.values[:, None])
    assert set(capture.length.values) != {24}


def test_every_chunk_of_a_sequence_is_read_where_it_belongs(workspace):
    """Chunks of a few positions, sequences that end within one, and indices that cross them, against the values themselves."""
    acts, exact = random_acts(3, "bfloat16", shape=(3, 4, 50), width=8)
    lengths = np.array([50, 17, 33, 48], np.int32)
    prepared = synthetic.prepared_for(acts, "bfloat16", lengths=lengths)
    layout = synthetic.write_capture(prepared, workspace, acts, chunk_bytes=16 * 16, lengths=lengths)
    assert layout.chunk_positions == 13, "the indices below cross the edges of chunks"
    folder = workspace.capture(prepared.capture_id)
    ids = np.arange(200, dtype=np.int32).reshape(4, 50)
    fixed = {"format": 1, "token_sha256": token_hash(ids, lengths), "lengths_sha256": lengths_hash(lengths, 50)}
    write_fingerprint(folder, {"fixed": fixed, "layout": shapes_of(layout), "threads": 1})
    capture = open_capture(prepared.capture_id, workspace.root)
    for site, values in exact.items():
        wanted = np.array(values, np.float32)
        wanted[:, np.arange(50)[None, :] >= lengths[:, None]] = np.nan
        lazy = capture[site].variable
        for key in (
            (slice(None),) * 4,
            (0, 3, [47, 15, 16, 2], slice(2, 7, 2)),
            (slice(1, 3), [2, 1], slice(14, 40, 5), 3),
        ):
            expected = wanted
            for axis, index in reversed(list(enumerate(key))):
                expected = expected.take(np.arange(wanted.shape[axis])[index], axis)
            assert np.array_equal(lazy[key].values, expected, equal_nan=True), (site, key)
    (folder / "activations.zarr" / "lengths" / "c" / "0").write_bytes(np.array([50, 17, 33, 47], "<i4").tobytes())
    with pytest.raises(CorruptCapture, match="lengths hashes to"):
        open_capture(prepared.capture_id, workspace.root)


def test_results_that_are_home_are_published_and_nothing_is_computed_again(made, home, tmp_path):
    spec, study = made
    moved = tmp_path / "ws"
    shutil.copytree(home / "ws", moved)
    shutil.rmtree(moved / "captures")  # what would be needed to compute anything
    changes = {
        "publish_to": f"file://{tmp_path}/other",
        "compute": spec.compute.model_copy(update={"workspace": str(moved)}),
    }
    again = run_study(spec.model_copy(update=changes), progress=False)
    assert again.manifest["results_digest"] == study.manifest["results_digest"]
    assert list_studies(f"file://{tmp_path}/other").study_id[0] == study.study_id
    assert not list(moved.glob("captures/*"))


def test_a_table_that_was_cut_says_so(made):
    _, study = made
    note = f"{ROWS_LEFT_OUT}2 of the 5 rows with a hit"
    summary = study.summary | {"notes": [note]}
    cut = Study(study.place, study.manifest, dict(study._files) | {"summary.json": json.dumps(summary).encode()})
    with pytest.warns(UserWarning, match=note):
        cut.features("arrow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.features("arrow")


@pytest.mark.studies
def test_the_page_runs(tmp_path):
    """docs/python.md, its blocks in order, in a process of its own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    program = f"WORKSPACE = {str(tmp_path)!r}\n" + "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "GB of weights" in done.stdout and "247" in done.stdout
