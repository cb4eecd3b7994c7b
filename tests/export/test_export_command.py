"""`outliers export`, as a person gives it: files whole or not at all, never among results, and no model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy

from flows.cli import main
from flows.cli.export import FORMATS
from outliers.errors import BadInput, CorruptCapture
from outliers.export.bring import bring_summary, fetch_summary, find_machine
from outliers.export.formats import TARGETS
from outliers.machines.local import LocalMachine
from outliers.machines.rentals import Rentals
from outliers.steps import run_report
from outliers.study.demand import demand_of
from outliers.study.expert_shapes import ExpertShapes
from outliers.untrusted.bounds import RECEIVED_BYTES
from outliers.workspace import open_workspace
from tests.support.synthetic import Silent


@pytest.fixture(scope="module")
def finished(whole):
    """The tiny study with its results."""
    workspace, _, prepared = whole
    run_report(prepared, workspace, Silent())
    return workspace, prepared


@pytest.fixture
def export(finished, tmp_path, capsys):
    """Runs the command on the study; (exit code, standard output, standard error)."""
    workspace, prepared = finished

    def run(*options, study=prepared.study_id, root=workspace.root):
        code = main(["export", str(study), "--workspace", str(root), *map(str, options)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_help_names_every_format():
    assert tuple(TARGETS) == FORMATS


def test_a_file_and_what_it_left_alone(export, tmp_path):
    out = tmp_path / "quantization_config.json"
    code, said, _ = export("--to", "bitsandbytes", "--skip-above", 7, "--out", out)
    assert code == 0
    listed = json.loads(out.read_text())["llm_int8_skip_modules"]
    assert len(listed) > 1 and listed[0] == "lm_head"
    assert all(name in said for name in listed) and str(out) in said


def test_json_has_the_files_and_the_notes(export, tmp_path):
    out = tmp_path / "recipe.yaml"
    code, printed, _ = export("--to", "llm-compressor", "--out", out, "--json")
    found = json.loads(printed)
    beside = tmp_path / "recipe.smoothquant.safetensors"
    assert code == 0 and found["files"] == [str(out), str(beside)]
    assert "model.layers.0.input_layernorm.min" in safetensors.numpy.load(beside.read_bytes())


def test_a_file_that_is_there_stays_unless_forced(export, tmp_path):
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    code, _, said = export("--to", "llm-compressor", "--out", out)
    assert code == 2 and "is there already: give another name, or --force" in said and out.read_text() == "mine"
    assert export("--to", "llm-compressor", "--out", out, "--force")[0] == 0
    assert out.read_text() != "mine"
    out.unlink()
    code, _, said = export("--to", "llm-compressor", "--out", out)
    assert code == 2 and "recipe.smoothquant.safetensors is there already" in said and not out.exists()


def test_nothing_is_written_among_results(export, finished, tmp_path):
    workspace, prepared = finished
    folder = workspace.study(prepared.study_id)
    before = sorted(path.name for path in folder.rglob("*"))
    code, _, said = export("--to", "imatrix", "--out", folder / "x.gguf")
    assert code == 2 and "among results, which may be published" in said
    (tmp_path / "link").symlink_to(folder)
    assert export("--to", "imatrix", "--out", tmp_path / "link" / "x.gguf")[0] == 2
    copy = shutil.copytree(folder, tmp_path / "published")
    assert export("--to", "imatrix", "--out", copy / "x.gguf")[0] == 2
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--to", "imatrix", "--out", "."), "is a folder: give the file's name too"),
        (("--to", "imatrix", "--out", "no/such/x.gguf"), "there is no folder"),
        (("--to", "nothing", "--out", "x"), "--to nothing is not a format"),
    ],
)
def test_bad_options_are_refused_before_a_study_is_read(export, options, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, said = export(*options, study="no such study")
    assert code == 2 and why in " ".join(said.split())


def test_a_study_that_is_not_there(export, tmp_path):
    code, _, said = export("--to", "imatrix", "--out", tmp_path / "x.gguf", study="0123456789abcdef")
    assert code == 2 and "there is no study 0123456789abcdef" in said
    code, _, said = export("--to", "imatrix", "--out", tmp_path / "x.gguf", study="file:///atlas/a/b")
    assert code == 2 and "published study, which has no statistics of columns" in said


def test_a_results_folder_leads_to_the_statistics_of_its_own_workspace(export, finished, tmp_path):
    workspace, prepared = finished
    out = tmp_path / "x.gguf"
    elsewhere = open_workspace(tmp_path / "elsewhere").root
    assert export("--to", "imatrix", "--out", out, study=workspace.study(prepared.study_id), root=elsewhere)[0] == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_every_format_without_torch(finished, tmp_path):
    """A process of its own makes every format but the pickle, and has not imported torch or transformers at its end."""
    workspace, prepared = finished
    code = f"""
import sys
from flows.cli import main
from flows.cli.export import FORMATS
for to in {sorted(TARGETS)!r}:
    skip = ["--skip-above", "7"] if to == "llama-quantize" else []
    argv = ["export", {prepared.study_id!r}, "--workspace", {str(workspace.root)!r}, "--to", to, "--out", to, *skip]
    assert main(argv) == 0, to
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=dict(os.environ) | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert {path.name for path in tmp_path.iterdir()} >= set(TARGETS)


def test_the_summary_comes_home_from_a_machine(finished, tmp_path):
    workspace, prepared = finished
    home = open_workspace(tmp_path / "home")
    away = LocalMachine(workspace.root, "lab1")
    place = home.summary(prepared.capture_id, prepared.study_id)
    fetch_summary(away, place, prepared)
    there = workspace.summary(prepared.capture_id, prepared.study_id)
    assert (place / "totals.npz").read_bytes() == (there / "totals.npz").read_bytes()
    assert bring_summary(home, prepared.study_id, prepared.capture_id) is None
    fetch_summary(away, place, prepared)  # another process was first
    assert [path.name for path in place.parent.iterdir()] == [prepared.study_id]


def test_as_much_comes_home_as_the_study_keeps(finished, tmp_path):
    """The sums of gpt-oss-120b's experts alone are more than a folder of results may have."""
    large = ExpertShapes(tuple(range(36)), 128, 4, 2880, (), 2880)
    assert large.sums_bytes + 8 * 36 * 128 * 2880 > RECEIVED_BYTES
    workspace, prepared = finished
    asked = []

    class Noted(LocalMachine):
        def download(self, remote, local, *, max_bytes=RECEIVED_BYTES, **options):
            asked.append(max_bytes)
            super().download(remote, local, max_bytes=max_bytes, **options)

    home = open_workspace(tmp_path / "home")
    fetch_summary(Noted(workspace.root, "lab1"), home.summary(prepared.capture_id, prepared.study_id), prepared)
    kept = demand_of(prepared.spec, prepared.model).private_bytes
    assert kept > 0 and asked == [kept + RECEIVED_BYTES]


@pytest.mark.parametrize(
    ("name", "holder", "state", "found"),
    [
        ("outliers-{capture}", "0123456789abcdef.run", "up", True),
        ("mine", "{study}.run", "up", True),
        ("mine", "0123456789abcdef.run", "up", False),
        ("outliers-{capture}", "{study}.run", "launching", False),
    ],
)
def test_the_machine_of_a_study_is_found_by_its_capture_or_its_run(finished, tmp_path, name, holder, state, found):
    _, prepared = finished
    home, ids = open_workspace(tmp_path / "home"), {"capture": prepared.capture_id, "study": prepared.study_id}
    rentals = Rentals(home.root)
    rentals.begin(name.format(**ids), "local", "here", 0.0, holder.format(**ids), "a study", 600)
    rentals.mark(name.format(**ids), state)
    if found:
        assert find_machine(home, prepared.study_id, prepared.capture_id).provider == "local"
    else:
        with pytest.raises(BadInput, match=r"no machine of the study .* is held"):
            find_machine(home, prepared.study_id, prepared.capture_id)


def test_what_is_damaged_or_not_there_does_not_stay(finished, tmp_path):
    workspace, prepared = finished
    home = open_workspace(tmp_path / "home")
    place = home.summary(prepared.capture_id, prepared.study_id)
    with pytest.raises(BadInput, match=r"no machine of the study .* is held, so its statistics can't be brought home"):
        bring_summary(home, prepared.study_id, prepared.capture_id)
    empty = LocalMachine(open_workspace(tmp_path / "empty").root, "lab2")
    with pytest.raises(BadInput, match="lab2 has no summary of the study"):
        fetch_summary(empty, place, prepared)
    damaged = open_workspace(tmp_path / "damaged")
    source = damaged.summary(prepared.capture_id, prepared.study_id)
    shutil.copytree(workspace.summary(prepared.capture_id, prepared.study_id), source)
    (source / "totals.npz").write_bytes(b"PK")
    with pytest.raises(CorruptCapture, match="that came from lab3 is not whole"):
        fetch_summary(LocalMachine(damaged.root, "lab3"), place, prepared)
    assert list(place.parent.iterdir()) == []
