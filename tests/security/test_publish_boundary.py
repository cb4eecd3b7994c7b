"""What leaves is rendered on this side, of numbers that passed their schemas: a machine's or a store's page never does.

The machine is a workspace of its own that others may have written to, behind the real LocalMachine; the store a folder
that others write to. Each test plants something there, and looks at what arrives and what is published.
"""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest

from flows.cli.run_show import read_run
from outliers.errors import BadInput, DigestConflict, JobFailed, PublishRefused
from outliers.files.parquet import open_parquet, parquet_bytes, read_parquet
from outliers.machines.local import LocalMachine
from outliers.publish.allowlist import NUMBERS, PICTURES
from outliers.publish.manifest import digest_of, dump_manifest, file_list, folder_of, headline_of, read_manifest
from outliers.publish.outcome import find_outcome
from outliers.publish.publish import fetch, model_slug, publish
from outliers.publish.publishable import read_publishable
from outliers.publish.received import read_provenance, receive_study
from outliers.results.write import json_bytes
from outliers.steps import run_analyze, run_report, run_state
from outliers.workspace import open_workspace
from tests.counting.test_counting import random_acts
from tests.security.pages import Tags, files_of
from tests.support import synthetic
from tests.support.synthetic import Silent

SCRIPT = "<!doctype html><script>document.title = 'pwned'</script>"
ACTIVATIONS = np.random.default_rng(5).normal(size=50_000).astype(np.float32).tobytes()
EVIL = (
    "<script>document.title='pwned'</script>",
    "x\" onload=\"document.title='pwned'",
    "javascript:document.title='pwned'",
    "a$\\frac{1}{0}$b$",
    "a\u202eb\u2066c",
    "a\x1b[31mb\x00c",
    "</title><svg/onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A machine that has counted a study, and how the same study is where it was also reported: (machine, study, folder)."""
    acts, _ = random_acts(3, "bfloat16", sites=("attn_in", "mlp_in", "resid"))
    acts["resid"][1, :, 4, 2] = 0x46EA  # 29,952: massive
    workspace = open_workspace(tmp_path_factory.mktemp("made") / "machine")
    study = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(study, workspace, acts)
    run_analyze(study, workspace, Silent())
    run_report(study, workspace, Silent(), numbers=True)
    whole = open_workspace(tmp_path_factory.mktemp("whole") / "ws")
    shutil.copytree(workspace.root, whole.root, dirs_exist_ok=True)
    run_report(study, whole, Silent())
    return workspace, study, whole.study(study.study_id)


class Case:
    """A machine's workspace and this side's, where nothing of the study is but its corpus."""

    def __init__(self, made, folder):
        shutil.copytree(made[0].root, folder / "machine")
        self.there, self.study, self.expected = open_workspace(folder / "machine"), made[1], made[2]
        self.here = open_workspace(folder / "here")
        shutil.copytree(made[0].corpora, self.here.corpora, dirs_exist_ok=True)
        self.machine = LocalMachine(self.there.root, "lab1")
        self.numbers = self.there.summary(self.study.capture_id, self.study.study_id) / "numbers"
        self.results = self.here.study(self.study.study_id)

    def receive(self, digest=None):
        return receive_study(self.study, self.machine, self.here, Silent(), digest)

    def edit(self, name, change):
        path = self.numbers / name
        content = json.loads(path.read_bytes())
        change(content)
        path.write_bytes(json_bytes(content))


@pytest.fixture
def case(made, tmp_path):
    return Case(made, tmp_path)


# What a machine renders, or leaves next to its numbers


def test_the_machine_writes_numbers_alone(made):
    workspace, study, _ = made
    assert not workspace.study(study.study_id).exists()
    names = {path.name for path in (workspace.summary(study.capture_id, study.study_id) / "numbers").iterdir()}
    assert names == {*NUMBERS, PICTURES, "provenance.json", "checksums.json"}
    assert run_state(study, workspace, Silent())["results"]


def test_what_arrives_is_what_is_made_where_it_is_counted(case):
    """Byte for byte, so nothing of a study is lost by the way that its numbers take."""
    told = case.receive()
    assert files_of(case.results) == files_of(case.expected)
    manifest = read_manifest(case.results)
    assert told == {"results_digest": manifest["results_digest"], "files": len(manifest["files"])}
    assert {"report.html", "plots/heatmap.png", *NUMBERS} <= {file["path"] for file in manifest["files"]}


def test_nothing_else_of_the_machine_arrives_or_is_published(case, tmp_path):
    for folder in (case.numbers, case.there.study(case.study.study_id)):
        (folder / "plots").mkdir(parents=True)
        (folder / "report.html").write_text(SCRIPT)
        (folder / "plots" / "heatmap.png").write_bytes(ACTIVATIONS)
        (folder / "plots" / "extra.png").write_bytes(ACTIVATIONS)
        (folder / "activations.zarr").mkdir()
        (folder / "activations.zarr" / "c.0").write_bytes(ACTIVATIONS)
        (folder / "index.html").write_text(SCRIPT)
        (folder / "manifest.json").write_text("{}")
        (folder / "secret.json").symlink_to("/etc/hostname")
        os.mkfifo(folder / "plots" / "pipe.png")
    began = time.monotonic()
    case.receive()
    assert time.monotonic() - began < 120
    assert files_of(case.results) == files_of(case.expected)
    publish(case.results, f"file://{tmp_path}/store", "a-model")
    (stored,) = (tmp_path / "store").glob(f"a-model/{case.study.study_id}/*/")
    # the expected folder has the page of its owner; what is published is rendered of its numbers alone
    assert files_of(stored) == read_publishable(case.expected).files


def test_padding_in_numbers_does_not_arrive(case):
    """White space, escapes, and all that a Parquet file holds in addition to its columns' values."""
    for name in ("summary.json", "tokens.json"):
        content = json.loads((case.numbers / name).read_bytes())
        (case.numbers / name).write_text(json.dumps(content, indent=3, ensure_ascii=True) + " \n\t" * 5_000)
    path = case.numbers / "features.parquet"
    table = read_parquet(path.read_bytes()).replace_schema_metadata({"activations": ACTIVATIONS[:10_000]})
    path.write_bytes(parquet_bytes(table))
    assert open_parquet(path.read_bytes()).metadata.metadata
    case.receive()
    assert files_of(case.results) == files_of(case.expected)


# Numbers that are not what they should be


def _rename(block, name):
    def change(content):
        content[block][name] = EVIL[0]

    return change


def _massive(content):
    content["massive"][0]["token"] = "other"


def _top(content):
    content["features"][0]["top"][0]["before"] = "other"


def _far(content):
    content["features"][0]["top"][0]["sequence"] = 10**9


HOSTILE = {
    "another study": ("summary.json", lambda content: content.update(study_id="0" * 16)),
    "another capture": ("summary.json", lambda content: content.update(capture_id="0" * 16)),
    "a name of its own": ("summary.json", _rename("model", "id")),
    "an architecture of its own": ("summary.json", _rename("model", "architecture")),
    "a corpus of its own": ("summary.json", _rename("corpus", "source")),
    "another magnitude": ("summary.json", lambda content: content["criteria"].update(magnitude=5.5)),
    "a model without a revision": ("summary.json", lambda content: content["model"].pop("quantization")),
    "a key too many": ("summary.json", lambda content: content.update(activations=[0.5])),
    "a text as massive token": ("summary.json", _massive),
    "a text around a token": ("tokens.json", _top),
    "a place that does not exist": ("tokens.json", _far),
    "no text": ("tokens.json", lambda content: content.update(text=False)),
    "a number of a thousand digits": ("summary.json", lambda content: content["layers"][0].update(hits=10**1000)),
    "a long note": ("summary.json", lambda content: content.update(notes=["x" * 2_000])),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_other_numbers_are_refused(case, how):
    case.edit(*HOSTILE[how])
    with pytest.raises(JobFailed, match=r"lab1 gives of .* are refused"):
        case.receive()
    assert not case.results.exists()


def test_text_that_may_not_leave_is_looked_for_here(case):
    """A machine that was asked to keep the text back, and gives it."""
    case.study = case.study.model_copy(update={"text": False})
    case.edit("summary.json", lambda content: content["corpus"].update(publish_text="none"))
    case.edit("tokens.json", lambda content: content.update(text=False))
    with pytest.raises(JobFailed, match="are refused"):
        case.receive()

    def silent(content):
        for row in (*content["massive"], *(row for feature in content["features"] for row in feature["top"])):
            row.update(token=None, before=None, after=None)

    case.edit("tokens.json", silent)
    with pytest.raises(JobFailed, match="the text of this corpus is not to be published"):
        case.receive()  # the tokens of massive activations stand in summary.json too
    case.edit("summary.json", lambda c: [row.update(token=None) for row in (*c["massive"], *c["massive_by_token"])])
    case.receive()


def test_a_refusal_shows_no_control_characters(case):
    """A key that is not known is named by the error."""
    case.edit("summary.json", lambda content: content.update({"\x1b]0;pwned\x07\u202e[/red]": 1}))
    with pytest.raises(JobFailed, match="are refused") as caught:
        case.receive()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [*NUMBERS, PICTURES, "provenance.json"])
@pytest.mark.parametrize("how", ["missing", "a folder", "too large", "torn", "not UTF-8", "nested", "empty"])
def test_files_that_are_none_are_refused(case, name, how):
    path = case.numbers / name
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
        (path / "x").write_bytes(content)
    elif how == "too large":
        path.write_bytes(content)
        os.truncate(path, 8_000_001)  # sparse
    elif how != "missing":
        path.write_bytes(
            {"torn": content[: len(content) // 2], "not UTF-8": b'"\xff"', "nested": b"[" * 100_000, "empty": b""}[how]
        )
    with pytest.raises(JobFailed, match=r"are refused"):
        case.receive()
    assert not case.results.exists()


def test_numbers_are_those_that_the_step_named(case):
    with pytest.raises(JobFailed, match="said it counted '000000000000'"):
        case.receive("0" * 64)
    assert not case.results.exists()


def test_other_numbers_never_replace_those_that_are_here(case):
    case.receive()
    before = files_of(case.results)
    case.edit("summary.json", lambda content: content["layers"][0].update(nonfinite=7))
    with pytest.raises(DigestConflict):
        case.receive()
    assert files_of(case.results) == before


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}x",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": 1' + b"0" * 400 + b"}",
        b'{"a": ' * 10 + b"1" + b"}" * 10,
        b"[" * 5_000,
        json.dumps({"a": list(range(5_000))}).encode(),
    ],
)
def test_provenance_that_is_none(content):
    with pytest.raises(ValueError, match=r"."):
        read_provenance(content)


def test_of_provenance_only_short_plain_text_is_kept(case):
    known = json.loads((case.numbers / "provenance.json").read_bytes())
    evil = {"versions": dict.fromkeys(EVIL, EVIL[5] + "x" * 5_000)}
    (case.numbers / "provenance.json").write_text(json.dumps(known | evil))
    case.receive()
    manifest = (case.results / "manifest.json").read_text()
    assert "\\u001b" not in manifest
    assert "x" * 401 not in manifest
    assert Tags(SCRIPT).names != Tags((case.results / "report.html").read_text()).names
    assert "script" not in {name for name, _ in Tags((case.results / "report.html").read_text()).names}


# A store that others can write to


@pytest.fixture
def store(case, tmp_path):
    """The study published by someone with another page and pictures: (case, study as asked for there, folder)."""
    case.receive()
    target = f"file://{tmp_path}/store"
    slug = model_slug(case.study.model.source.id)
    publish(case.results, target, slug)
    shutil.rmtree(case.results)
    spec = case.study.spec.model_copy(update={"publish_to": target})
    case.study = case.study.model_copy(update={"spec": spec})
    return case, target, slug, tmp_path / "store" / slug / case.study.study_id


def republish(place, change, *, honest=True):
    """Change the published files, by path, and let the manifest agree; `honest`: with the numbers, too."""
    manifest = json.loads((place / "manifest.json").read_bytes())
    files = files_of(place / manifest["folder"])
    change(files)
    listed = file_list(files)
    manifest |= {"files": listed, "folder": folder_of(listed)}
    if honest:
        manifest |= {"results_digest": digest_of(files), "headline": headline_of(json.loads(files["summary.json"]))}
    for path, data in files.items():
        target = place / manifest["folder"] / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    (place / "manifest.json").write_bytes(dump_manifest(manifest))


def test_of_a_published_study_numbers_alone_come_home(store):
    case, _, _, place = store

    def change(files):
        files["report.html"] = SCRIPT.encode()
        files["plots/heatmap.png"] = ACTIVATIONS
        files["plots/more.png"] = ACTIVATIONS
        files["run.log"] = b"\x1b]0;pwned\x07"

    republish(place, change)
    assert find_outcome(case.study, case.here).cached
    assert files_of(case.results) == files_of(case.expected)


def _replaced(name, old, new):
    def change(files):
        assert old in files[name]
        files[name] = files[name].replace(old, new)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _replaced("summary.json", b'"hits":', b'"hits":1'),
        _replaced("summary.json", b"{", b'{"activations":[0.5],'),
        _replaced("tokens.json", b'"text":true', b'"text":false'),
        _replaced("features.parquet", b"PAR1", b"PAR2"),
        lambda files: files.pop("tokens.json"),
        lambda files: files.update({"summary.json": files["tokens.json"]}),
    ],
)
def test_published_numbers_that_are_none_are_refused(store, change, tmp_path):
    _, target, slug, place = store
    republish(place, change, honest=False)
    with pytest.raises(PublishRefused):
        fetch(target, slug, place.name, tmp_path / "back")
    assert files_of(tmp_path / "back") == {}


def test_a_published_study_that_is_read_alone_is_checked_too(store):
    """`outliers runs show URL` reads two files."""
    case, _, _, place = store
    assert read_run(place.as_uri(), case.here).summary["study_id"] == place.name
    republish(place, _replaced("summary.json", b"{", b'{"activations":[0.5],'), honest=False)
    with pytest.raises(BadInput, match="not a study that this program reads"):
        read_run(place.as_uri(), case.here)
