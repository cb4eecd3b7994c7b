"""A study and a capture that an earlier version wrote still mean what they meant: formats, ids and digests are contracts.

`study_0_1.txt` is a workspace in text form, made by the version before the packages: a tiny Llama in float32, 4 sequences of 24
tokens, its capture, its corpus and its results without plots and page. To look into it: `unpack`.
"""

from __future__ import annotations

import base64
import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import transformers

from outliers.publish.manifest import read_manifest
from outliers.steps import capture_exists, run_analyze, run_report, run_verify
from outliers.study.prepare import prepare, read_prepared
from outliers.workspace import Workspace
from tests.support import tiny
from tests.support.synthetic import Silent

TEXT = Path(__file__).parents[1] / "support" / "study_0_1.txt"
STUDY, CAPTURE = "93f67f4293a2a743", "b051961cd6210e33"
TRANSFORMERS = "5.17.0"
"""The version that saved the model; it stands in two of its files, whose bytes are a part of the model's revision."""
DIGEST = "f82d3b468f3a66c5fb43172d48348c6940066e473733d953b351ed0a1cf8929d"


def unpack(folder: Path) -> Workspace:
    """The old workspace, as it was."""
    data = lzma.decompress(base64.b85decode("".join(TEXT.read_text().split())))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
    return Workspace(folder)


@pytest.fixture
def old(tmp_path):
    return unpack(tmp_path / "old")


def study_of(workspace):
    return read_prepared(workspace.root / "studies" / f"{STUDY}.json", workspace)


def test_a_capture_of_before_is_whole_and_counts_to_the_same_digest(old):
    study = study_of(old)
    assert (study.study_id, study.capture_id) == (STUDY, CAPTURE)
    assert capture_exists(study, old)
    run_verify(study, old, Silent())
    before = old.root / "before"
    shutil.move(old.study(STUDY), before)
    shutil.rmtree(old.capture(CAPTURE) / "summaries")
    run_analyze(study, old, Silent())
    assert run_report(study, old, Silent())["results_digest"] == DIGEST
    made = old.study(STUDY)
    for name in ("summary.json", "tokens.json"):
        assert (made / name).read_bytes() == (before / name).read_bytes(), name
    assert pq.read_table(made / "features.parquet").equals(
        pq.read_table(before / "features.parquet"), check_metadata=True
    )
    then, now = json.loads((before / "manifest.json").read_text()), read_manifest(made)
    assert now["results_digest"] == then["results_digest"] == DIGEST
    assert set(now) == set(then) and now["headline"] == then["headline"]


def test_a_summary_of_before_is_counted_no_second_time(old):
    """Its own numbers are read: the old summary is of the same format."""
    study = study_of(old)
    before = (old.study(STUDY) / "summary.json").read_bytes()
    shutil.rmtree(old.study(STUDY))
    for chunk in (old.capture(CAPTURE) / "activations.zarr").rglob("c.*"):
        chunk.unlink()  # whoever counts again needs these
    assert run_report(study, old, Silent())["results_digest"] == DIGEST
    assert (old.study(STUDY) / "summary.json").read_bytes() == before


def test_the_same_spec_has_the_ids_of_before(old, tmp_path):
    """The model is made by code, bit for bit: its revision, and with it both ids, are what they were."""
    folder = Path(tiny.make_model(tmp_path / "model", "Llama"))
    for name in ("config.json", "generation_config.json"):
        saved = (folder / name).read_text()
        (folder / name).write_text(saved.replace(f'"{transformers.__version__}"', f'"{TRANSFORMERS}"'))
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox — jumps over the lazy dog, “twice”.\n" * 60)
    before = study_of(old)
    spec = before.spec.model_copy(
        update={
            "model": before.spec.model.model_copy(update={"id": str(folder)}),
            "corpus": before.spec.corpus.model_copy(update={"source": str(text)}),
        }
    )
    after = prepare(spec, Workspace(tmp_path / "new"))
    assert (after.study_id, after.capture_id) == (STUDY, CAPTURE)
