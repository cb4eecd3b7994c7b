"""`outliers runs list|show|compare`: finished studies read back from the workspace, a folder, and where they are published."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from flows.cli.run_show import read_run
from outliers.counting.analyze import analyze
from outliers.publish.own import keep_names
from outliers.publish.publish import model_slug, publish
from outliers.steps import run_report
from outliers.workspace import open_workspace
from tests.support import synthetic
from tests.support.atlas_store import MODELS, edited, quick_store, study
from tests.support.commands import run_command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study in a workspace, and its published URL; feature 3 is systematic, feature 1 is hit in layer 2 alone."""
    values = np.full((4, 2, 10, 6), 0.5, np.float32)
    values[..., 3] = -9.0
    values[2, :, 4, 1] = 7.0
    acts = {site: synthetic.store(values * scale, "bfloat16")[0] for site, scale in (("attn_in", 1), ("mlp_in", 0.8))}
    place = tmp_path_factory.mktemp("runs")
    workspace = open_workspace(place / "workspace")
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts)
    analyze(prepared, workspace, synthetic.Silent())
    run_report(prepared, workspace, synthetic.Silent())
    target, slug = f"file://{place}/atlas", model_slug(prepared.model.source.id)
    publish(workspace.study(prepared.study_id), target, slug)
    return workspace, prepared, f"{target}/{slug}/{prepared.study_id}"


def show(workspace, *arguments):
    return runs(workspace, "show", *arguments)


def runs(workspace, action, *arguments):
    words = ("runs", action, *arguments, "--workspace", workspace.root)
    return run_command(Path.cwd(), *words, environment=os.environ)


@pytest.mark.servers
def test_a_study_is_shown_from_wherever_it_is(finished, tmp_path):
    workspace, prepared, url = finished
    folder = str(workspace.study(prepared.study_id))
    elsewhere = open_workspace(tmp_path)
    shown = [
        show(workspace),
        show(workspace, prepared.study_id),
        show(elsewhere, folder),
        show(elsewhere, url),
        show(elsewhere, f"{url}/manifest.json"),
    ]
    published = url.removeprefix("file://")
    shown.append(show(elsewhere, published))
    shown.append(show(elsewhere, os.path.relpath(published)))
    for done in shown:
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    # only the workspace knows what the model's folder is called
    assert f"of {prepared.model.source.name}, 4 layers" in shown[0].stdout
    assert f"of {prepared.model.source.id}, 4 layers" in shown[2].stdout
    assert len({done.stdout.replace("of local:synthetic,", "of synthetic,") for done in shown}) == 1
    said = " ".join(shown[0].stdout.split())
    assert "1 systematic outlier feature (range over resamples of the sequences: 1) by pooled at block" in said
    assert "model LlamaForCausalLM, bfloat16 corpus synthetic" in said
    assert "block 0 3 20 2 -9 -7.188" in said


@pytest.mark.servers
def test_one_feature_layer_by_layer(finished):
    workspace, prepared, _ = finished
    done = show(workspace, prepared.study_id, "--feature", "1", "--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert [(row["site"], row["layer"], row["feature"], row["hits"]) for row in found["features"]] == [
        ("attn_in", 2, 1, 2),
        ("block", 2, 1, 2),
    ]
    assert found["summary"]["study_id"] == prepared.study_id
    only = json.loads(show(workspace, prepared.study_id, "--site", "mlp_in", "--layer", "3", "--json").stdout)
    assert [(row["feature"], row["max"]) for row in only["features"]] == [(3, -7.1875)]
    nothing = show(workspace, prepared.study_id, "--feature", "5")
    assert "no row with a hit for feature 5" in nothing.stdout


@pytest.mark.servers
def test_studies_of_ones_own_files_are_compared_by_their_names(finished, two, tmp_path):
    """The names are those of this machine; of what was published, the published ones."""
    workspace, prepared, url = finished
    shutil.copytree(workspace.root, tmp_path / "workspace")
    own = open_workspace(tmp_path / "workspace")
    source = prepared.model.source.model_copy(update={"name": "my-tuned-7b"})
    keep_names(prepared.model_copy(update={"model": prepared.model.model_copy(update={"source": source})}), own)

    def model_of(*studies):
        done = runs(own, "compare", *studies)
        assert done.returncode == 0, done.stderr
        return next(row for row in done.stdout.splitlines() if row.startswith("model "))

    assert "my-tuned-7b" in model_of(prepared.study_id, two[1][2])
    published = model_of(url, two[1][2])
    assert "my-tuned-7b" not in published
    assert "local:synthetic" in published


@pytest.mark.servers
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there is no study nothing"),
        (["../results"], "there is no study"),
        (["--site", "resid"], "--site resid was not captured; there is: attn_in, mlp_in, block"),
        (["--feature", "6"], "--feature 6 is not in that study; its features are 0 to 5"),
        (["--feature=-1"], "--feature -1 is not in that study; its features are 0 to 5"),
        (["--layer", "4"], "--layer 4 is not in that study; its layers are 0 to 3"),
        (["s3://bucket"], "is not TARGET/<model>/<study_id>"),
        (["file:///nowhere/model/0123456789abcdef"], "has no manifest.json"),
        (["file:///nowhere/model/0123456789abcdef"], "`outliers runs list file:///nowhere` lists what is"),
    ],
)
def test_what_is_not_there_is_refused(finished, arguments, words):
    done = show(finished[0], *arguments)
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())


def edit(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.servers
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "features.parquet").unlink(), "are not whole: features.parquet is missing"),
        (
            lambda folder: (folder / "features.parquet").write_bytes(b"PAR1"),
            "are not whole: features.parquet has 4 bytes",
        ),
        (lambda folder: (folder / "summary.json").write_text("{"), "are not whole: summary.json has 1 bytes"),
        (lambda folder: (folder / "summary.json").unlink(), "are not whole: summary.json is missing"),
        # other numbers in valid JSON
        (lambda folder: edit(folder / "summary.json", b'"hits":', b'"hits":1'), "are not whole: summary.json has"),
        (lambda folder: edit(folder / "manifest.json", b'num_systematic": ', b'num_systematic": 1'), "says headline"),
    ],
)
def test_a_damaged_folder_is_an_error_in_words(finished, tmp_path, damage, words):
    workspace = open_workspace(tmp_path)
    folder = workspace.study(finished[1].study_id)
    shutil.copytree(finished[0].study(finished[1].study_id), folder)
    damage(folder)
    done = show(workspace)
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_of_a_published_study_two_files_are_read(finished):
    """Not the plots and the report, most of its bytes."""
    workspace, prepared, url = finished
    seen: list[str] = []
    target = url.removeprefix("file://")
    active = [True]  # a hook stays for good

    def hear(event, found):
        # folders are opened on the way to a file, which is then opened by its name alone
        if active and event == "open" and not (isinstance(found[2], int) and found[2] & os.O_DIRECTORY):
            seen.append(str(found[0]))

    sys.addaudithook(hear)
    run = read_run(url, workspace)
    active.clear()
    opened = [path.rpartition("/")[2] for path in seen if path.startswith(target) or "/" not in path]
    assert sorted(opened) == ["features.parquet", "manifest.json", "summary.json"]
    assert run.summary["study_id"] == prepared.study_id
    assert run.table.num_rows > 0
    assert run.label is None


@pytest.mark.servers
def test_an_empty_workspace_has_no_newest(tmp_path):
    done = show(open_workspace(tmp_path))
    assert done.returncode == 2
    assert "there is no finished study" in done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A store with two studies of one model that differ in reading, and one of another model on another corpus."""
    root = tmp_path_factory.mktemp("two") / "store"
    other = study(3, MODELS[3], corpus=("builtin:python-docs", 2, 64), dtype="float16")
    quick_store(root, [study(1, MODELS[0]), study(2, MODELS[0], reading="union", features=5), other])
    return root, [f"file://{next(root.glob(f'*/{number:016x}'))}" for number in (1, 2, 3)]


@pytest.mark.servers
def test_studies_are_listed_from_the_workspace_and_from_where_they_are_published(finished, two, tmp_path):
    workspace, prepared, url = finished
    here = json.loads(runs(workspace, "list", "--json").stdout)
    there = json.loads(runs(open_workspace(tmp_path), "list", url.rsplit("/", 2)[0], "--json").stdout)
    for found in (here, there):
        assert found["skipped"] == []
        (item,) = found["studies"]
        assert item["study_id"] == prepared.study_id
        assert (item["num_systematic"], item["systematic"], item["reading"], item["site"]) == (
            1,
            [3],
            "pooled",
            "block",
        )
    assert there["studies"][0]["url"] == url
    assert (here["studies"][0].pop("model_name"), there["studies"][0].pop("model_name")) == (
        "synthetic",
        "local:synthetic",
    )
    assert here["studies"][0] | {"url": url} == there["studies"][0]
    (two[0] / "notes.txt").write_text("")
    done = runs(workspace, "list", str(two[0]))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "Qwen/Qwen3-0.6B 5 union block 32,768 0000000000000002" in said
    assert "by the hash of its content" not in said
    assert "notes.txt does not belong to a published study" in done.stderr
    assert "notes.txt" not in done.stdout
    said = runs(workspace, "list").stdout
    assert prepared.model.dtype in said and "synthetic" in said
    assert "local:" not in said and "4 x 6" not in said
    said = runs(workspace, "list", url.rsplit("/", 2)[0]).stdout
    assert "local:synthetic" in said and "4 x 6" in said
    assert (
        "by the hash of its content: a name is published only with --model-name; --label NAME tells studies apart"
        in said
    )
    assert here["studies"][0]["dtype"] == prepared.model.dtype


@pytest.mark.servers
def test_a_label_is_shown(two, tmp_path):
    root = two[0]
    edited(root, 3, spec={"label": "gpu-b"})
    workspace = open_workspace(tmp_path / "labels")
    assert "gpu-b" in runs(workspace, "list", str(root)).stdout
    acts = {"mlp_in": synthetic.store(np.full((2, 2, 5, 4), 7.0, np.float32), "float16")[0]}
    prepared = synthetic.prepared_for(acts, "float16", label="gpu-b")
    synthetic.write_capture(prepared, workspace, acts)
    analyze(prepared, workspace, synthetic.Silent())
    run_report(prepared, workspace, synthetic.Silent())
    done = show(workspace, prepared.study_id)
    assert done.returncode == 0, done.stderr
    assert "label gpu-b" in " ".join(done.stdout.split())
    assert ", float16" in done.stdout
    assert json.loads(show(workspace, prepared.study_id, "--json").stdout)["label"] == "gpu-b"


@pytest.mark.servers
def test_studies_stand_side_by_side(finished, two):
    workspace, prepared, _ = finished
    done = runs(workspace, "compare", *two[1][:2])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = " ".join(done.stdout.split())
    assert "reading ≠ pooled union" in said
    assert "criteria differ in reading: the answers are not to be compared; those counted alike are" in said
    assert "union at block 3 5" in said
    # in one line, and what was not measured is not left blank
    assert "features at abs(x) >= 6, counted alike\n" in done.stdout
    assert "perplexity – –" in said
    done = runs(workspace, "compare", prepared.study_id, two[1][2], "--json")
    found = json.loads(done.stdout)
    assert found["alike"] is False
    assert "corpus" in found["unlike_conditions"]
    assert [item["study_id"] for item in found["studies"]] == [prepared.study_id, f"{3:016x}"]
    assert found["features"] is None


@pytest.mark.servers
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "file:///nowhere/at/all"], "is not there, or is not a folder"),
        (
            ["list", "ftp://a/b"],
            "an artifact store is s3://bucket/prefix, hf://datasets/ORG/NAME/prefix or file:///folder",
        ),
        (["list", "MODEL"], "is the folder of one model; give the store it is in, file:///"),
        (["list", "STUDY"], "is one study; give the store it is in, file:///"),
        (["compare", "0"], "give two or more"),
        (["compare", "0", "0"], "is given twice"),
        (["compare", "0", "nothing"], "there is no study nothing"),
        (["compare", "0", "file:///nowhere/model/0123456789abcdef"], "has no manifest.json"),
        (["compare", "0", "STORE"], "store is not a study, it is an artifact store; `outliers runs list file:///"),
        (["compare", "0", "MODEL"], "is not a study, it is the folder of one model; `outliers runs list file:///"),
        (["show", "STORE"], "is not a study, it is an artifact store; `outliers runs list file:///"),
        (["show", "FOLDER"], "is not a study, it is an artifact store; `outliers runs list file:///"),
        (["show", "file:///store"], "`outliers runs list TARGET` lists all"),
        (["compare", "--strict", "0", "1"], "the studies are not alike: reading (pooled, union)"),
    ],
)
def test_what_can_not_be_listed_or_compared_is_refused(finished, two, arguments, words):
    """Digits stand for the studies of the store."""
    named = {str(number): url for number, url in enumerate(two[1])}
    named |= {"STUDY": two[1][0], "MODEL": two[1][0].rpartition("/")[0]}
    named |= {"STORE": f"file://{two[0]}", "FOLDER": str(two[0])}
    done = runs(finished[0], *[named.get(word, word) for word in arguments])
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())


@pytest.mark.servers
def test_an_empty_workspace_has_nothing_to_list(tmp_path):
    done = runs(open_workspace(tmp_path), "list")
    assert done.returncode == 2
    assert "there is no finished study" in done.stderr


@pytest.mark.servers
def test_a_card_from_wherever_the_study_is(finished, tmp_path):
    workspace, prepared, url = finished

    def card(*words):
        return run_command(tmp_path, "card", *words, "--workspace", workspace.root, environment=os.environ)

    made = [card(), card(prepared.study_id), card(url), card(str(workspace.study(prepared.study_id)))]
    assert {(done.returncode, done.stderr, done.stdout) for done in made} == {(0, "", made[0].stdout)}
    assert made[0].stdout.startswith("---\ntags:\n- outlier-features\n")
    assert "**1 systematic outlier feature** by the reading `pooled` at `block`" in made[0].stdout
    assert str(workspace.root) not in made[0].stdout
    (tmp_path / "README.md").write_text("mine")
    refused = card("--out", "README.md")
    assert (refused.returncode, (tmp_path / "README.md").read_text()) == (2, "mine")
    assert "--force" in refused.stderr
    assert card("--out", "README.md", "--force").returncode == 0
    assert (tmp_path / "README.md").read_text() == made[0].stdout
    told = json.loads(card("--json").stdout)
    assert f"---\n{told['front_matter']}---\n\n{told['body']}" == made[0].stdout
