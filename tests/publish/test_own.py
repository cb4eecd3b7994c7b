"""What the owner of a study sees here, and nothing of it in what is published: names of his files, and his text."""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from outliers.dispatch.study import dispatch_study
from outliers.dispatch.study_run import StudyRun
from outliers.errors import BadInput, DamagedResults
from outliers.publish.allowlist import read_numbers
from outliers.publish.finished import read_finished
from outliers.publish.outcome import find_outcome
from outliers.publish.own import names_of_captures, own_names, private_words, published_line
from outliers.publish.publishable import render_files
from outliers.publish.runlog import rename, scrub
from outliers.publish.shelf import read_study
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.html_page import Page
from tests.support.synthetic import Silent

MODEL = "Ölmodell <b>&\u202e 7B\x1b[31m"
CORPUS = "geheime Akte's\u200f.txt"
SHOWN_MODEL, SHOWN_CORPUS = r"Ölmodell <b>&\u202e 7B\x1b[31m", r"geheime Akte's\u200f.txt"
TEXT = "Zürichsee-Passwort „Öl“ ✂ שלום <script>alert</script> & mehr\u202e Geheimnis.\n" * 60
WORDS = ("Ölmodell", "geheime", "Akte", "Passwort", "Zürichsee", "שלום", "Geheimnis")
SITES = {"sites": ["attn_in", "mlp_in", "resid"], "perplexity": True}
SPEC = {"probe": {"zero": ["systematic"]}, "publish_log": True}


def spec_of(home, **parts):
    given = tiny.spec_for(home / MODEL, home / CORPUS, capture=SITES, **SPEC, **parts) | {
        "publish_to": f"file://{home}/store"
    }
    return StudySpec.model_validate(given)


def run(spec, home):
    """The study, dispatched as the command does it: (prepared, workspace, outcome)."""
    workspace = open_workspace(home / "ws")
    prepared = prepare(spec, workspace)
    outcome = find_outcome(prepared, workspace) or dispatch_study(StudyRun(prepared, workspace, "run", Silent()))
    return prepared, workspace, outcome


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and a text whose names and words are unusual."""
    place = tmp_path_factory.mktemp("own")
    tiny.make_model(place / MODEL, "Mixtral")
    (place / CORPUS).write_text(TEXT)
    return place


@pytest.fixture(scope="module")
def made(home):
    """The study of them, probed and published without a name."""
    return run(spec_of(home), home)


@pytest.fixture
def copy(made, home, tmp_path):
    """A copy of its workspace: (prepared, workspace, results folder)."""
    shutil.copytree(home / "ws", tmp_path / "ws")
    workspace = open_workspace(tmp_path / "ws")
    return made[0], workspace, workspace.study(made[0].study_id)


def forms(text):
    """A text in every encoding that a page, JSON, a URL or a log could have it in."""
    escaped = html.escape(text)
    numbered = "".join(char if ord(char) < 128 else f"&#{ord(char)};" for char in text)
    return {text.encode(), escaped.encode(), numbered.encode(), quote(text).encode(), text.encode("utf-16-le")} | {
        json.dumps(text)[1:-1].encode(),
        text.encode("latin-1", "replace"),
    }


def published(store, study_id=""):
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and study_id in str(path)}


def test_no_byte_that_is_published_has_a_name_or_a_text(made, home):
    there = published(home / "store")
    assert {path.name for path in there} > {"report.html", "tokens.json", "run.log", "probe.html", "advice.json"}
    for word in (*WORDS, MODEL, CORPUS, SHOWN_MODEL, SHOWN_CORPUS):
        for form in forms(word):
            hits = [str(path) for path, data in there.items() if form in data or word in str(path)]
            assert hits == [], (word, form)
    prepared = made[0]
    page = next(data for path, data in there.items() if path.name == "report.html").decode()
    assert prepared.model.source.id in page and prepared.corpus.source in page
    assert "The text of this corpus is not part of the results" in page


def test_what_is_published_is_rendered_of_the_numbers_alone(made, home):
    prepared, workspace, _ = made
    folder = workspace.study(prepared.study_id)
    place = home / "store" / prepared.model.source.id.replace(":", "-") / prepared.study_id
    manifest = read_study(place.as_uri()).manifest
    files = place / manifest["folder"]
    there = {path.relative_to(files).as_posix(): data for path, data in published(files).items()}
    alone = render_files(read_numbers(folder), manifest["provenance"], folder, spec=manifest["spec"])
    for name in alone:
        assert there[name] == alone[name], name
    # a title is drawn, and not written: pictures of the owner differ
    assert (folder / "plots" / "sweep.png").read_bytes() != alone["plots/sweep.png"]
    for name in ("summary.json", "tokens.json", "features.parquet", "experts.parquet", "router.parquet"):
        assert (folder / name).read_bytes() == there[name], name


def test_the_page_of_the_owner_has_both(made):
    prepared, workspace, outcome = made
    folder = workspace.study(prepared.study_id)
    source = (folder / "report.html").read_text()
    page = Page(source)
    assert f"{SHOWN_MODEL} has " in page.text and SHOWN_CORPUS in page.text
    assert "Passwort" in page.text and "שלום" in page.text
    assert "<script>alert" not in source and "\x1b" not in source and "\u202e" not in source and "\u200f" not in source
    line = published_line(prepared)
    assert line == (
        f"Published, this study is called {prepared.model.source.id}, its corpus {prepared.corpus.source}, and it shows no text."
    )
    assert line in page.text
    assert "text of the corpus is left out" not in page.text
    probe = Page(Path(outcome.probe).read_text())
    assert SHOWN_MODEL in probe.text and SHOWN_CORPUS in probe.text
    assert f"Measured on {SHOWN_MODEL} in float32, {SHOWN_CORPUS}, " in page.text
    assert f"Measured on {SHOWN_MODEL} in float32, {SHOWN_CORPUS}, " in outcome.verdict
    assert (outcome.model, outcome.corpus) == (SHOWN_MODEL, SHOWN_CORPUS)
    assert outcome.title == f"{SHOWN_MODEL} 4x24"


def test_its_names_and_text_are_kept_for_the_owner_alone(made):
    prepared, workspace, _ = made
    kept = sorted(workspace.own(prepared.study_id).parent.iterdir())
    assert [path.name for path in kept] == [f"{prepared.study_id}.json", f"{prepared.study_id}.page.json"]
    for path in kept:
        assert path.stat().st_mode & 0o777 == 0o600
    assert own_names(workspace, prepared.study_id) == (SHOWN_MODEL, SHOWN_CORPUS)
    assert names_of_captures(workspace) == {prepared.capture_id: SHOWN_MODEL}


def test_a_damaged_page_is_found_and_rendered_again_with_both(copy):
    prepared, workspace, folder = copy
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").write_bytes(before.replace(b"Passwort", b"passwort"))
    with pytest.raises(DamagedResults, match=r"report.html"):
        read_finished(folder)
    shutil.rmtree(workspace.corpora)  # the text is kept beside the names
    assert find_outcome(prepared, workspace) is not None
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("gone", ["the page's record", "all of it", "the results"])
def test_pages_of_before_get_names_and_text_when_the_study_is_asked_for(copy, gone):
    """A page of an earlier version has none; results that are fetched have none either."""
    prepared, workspace, folder = copy
    before = (folder / "report.html").read_text()
    for path in workspace.own(prepared.study_id).parent.iterdir():
        if gone != "the page's record" or path.name.endswith(".page.json"):
            path.unlink()
    if gone == "the results":
        shutil.rmtree(folder)
    assert find_outcome(prepared, workspace).probe is not None
    now = (folder / "report.html").read_text()
    assert Page(now).text == Page(before).text
    assert SHOWN_MODEL in Page(next(folder.glob("probes/*/probe.html")).read_text()).text
    assert read_finished(folder) is not None


def test_a_study_asked_for_under_another_name_is_called_by_it(made, copy, home, tmp_path):
    _, workspace, folder = copy
    other = tmp_path / "Umbenannt"
    shutil.copytree(home / MODEL, other)
    spec = spec_of(home)
    again = prepare(spec.model_copy(update={"model": spec.model.model_copy(update={"id": str(other)})}), workspace)
    assert again.study_id == made[0].study_id
    assert find_outcome(again, workspace).model == "Umbenannt"
    text = Page((folder / "report.html").read_text()).text
    assert "Umbenannt has " in text and "Ölmodell" not in text
    assert own_names(workspace, again.study_id).model == "Umbenannt"


@pytest.mark.studies
def test_given_names_are_published_and_are_a_study_of_their_own(made, home):
    named = run(spec_of(home, model={"name": "Acme 7B"}, corpus={"name": "Acme manuals (2024)"}), home)
    other = prepare(spec_of(home, model={"name": "Acme 8B"}), named[1])
    study, workspace, outcome = named
    assert study.capture_id == made[0].capture_id
    assert len({study.study_id, other.study_id, made[0].study_id}) == 3
    there = published(home / "store", study.study_id)
    for word in WORDS:
        assert not any(form in data for form in forms(word) for data in there.values()), word
    page = Page(next(data for path, data in there.items() if path.name == "report.html").decode()).text
    assert "Acme 7B has " in page and "Acme manuals (2024)" in page and study.model.source.id in page
    summary = json.loads(next(data for path, data in there.items() if path.name == "summary.json"))
    assert (summary["model"]["id"], summary["model"]["name"]) == (study.model.source.id, "Acme 7B")
    assert (summary["corpus"]["source"], summary["corpus"]["name"]) == (study.corpus.source, "Acme manuals (2024)")
    advice = json.loads(next(data for path, data in there.items() if path.name == "advice.json"))
    assert advice["paragraph"].startswith("Measured on Acme 7B in float32, Acme manuals (2024), ")
    assert advice["model"] == study.model.source.id
    here = Page((workspace.study(study.study_id) / "report.html").read_text()).text
    assert "Acme 7B has " in here and "Passwort" in here and "Published, this study shows no text." in here
    assert outcome.title == "Acme 7B 4x24"


@pytest.mark.parametrize(
    ("part", "given", "words"),
    [
        ("corpus", {"source": "builtin:python-docs", "name": "Mine"}, "--corpus-name Mine is for a text of your own"),
        ("model", {"id": "builtin:smollm2", "name": "Mine"}, "--model-name Mine is for a model of your own"),
    ],
)
def test_what_has_a_public_name_gets_no_other(home, tmp_path, part, given, words):
    spec = spec_of(home).model_dump(mode="json")
    spec[part] |= given
    with pytest.raises(BadInput, match=words):
        prepare(StudySpec.model_validate(spec), open_workspace(tmp_path / "ws"))


@pytest.mark.parametrize(
    "name", ["", " x", "x ", "a/b", "local:0", "C:\\x", "x" * 81, "<b>", "Öl", "a\nb", "a\u202eb", "../x"]
)
def test_a_name_that_is_published_is_plain_and_short(name):
    for part in ("model", "corpus"):
        content = {"model": {"id": "m"}, "corpus": {}}
        content[part]["name"] = name
        with pytest.raises(ValueError, match="name"):
            StudySpec.model_validate(content)


def test_a_log_has_public_names_in_whole_words(made):
    words = private_words(made[0])
    model, corpus = made[0].model.source.id, made[0].corpus.source
    assert rename(f"loaded {MODEL} on cpu", words) == f"loaded {model} on cpu"
    assert rename(f"{made[0].spec.corpus.source} is read", words) == f"{corpus} is read"
    assert rename("a falcon, falconry", {"falcon": "local:0", "a": "local:1"}) == "a local:0, falconry"
    # a folder called `model` tells nothing, and lines say the word
    assert rename("the model, as loaded", {"model": "local:0"}) == "the model, as loaded"


def test_a_log_has_no_folder_above_a_model_or_text_whose_name_has_a_blank(made, monkeypatch):
    """The log names the whole path, whatever was typed."""
    prepared, workspace, _ = made
    place = Path("/srv/Kunde Meier")
    monkeypatch.chdir("/srv")
    spec, source = prepared.spec, prepared.model.source.model_copy(update={"path": f"{place}/m"})
    moved = prepared.model_copy(
        update={
            "model": prepared.model.model_copy(update={"source": source}),
            "spec": spec.model_copy(
                update={
                    "model": spec.model.model_copy(update={"id": "Kunde Meier/m"}),
                    "corpus": spec.corpus.model_copy(update={"source": "./Kunde Meier/t.txt"}),
                }
            ),
        }
    )
    text = f"loaded {place}/m/config.json, {place}/t.txt and 'Kunde Meier/m'"
    shown = scrub(rename(text, private_words(moved)), workspace.root)
    assert "Meier" not in shown and "Kunde" not in shown
    assert f"{source.id}/config.json" in shown and prepared.corpus.source in shown


@pytest.mark.servers
def test_the_terminal_calls_them_by_their_names(made, home):
    prepared, workspace, _ = made

    def said(*words):
        done = run_command(home, *words, "--workspace", workspace.root, environment=os.environ)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout and "\u202e" not in done.stdout and "\u200f" not in done.stdout
        return done.stdout

    study = prepared.study_id
    for words in (("runs", "list"), ("runs", "show", study), ("advise", study)):
        assert SHOWN_MODEL in said(*words) and SHOWN_CORPUS in said(*words), words
        assert "local:" not in said(*words), words
    assert SHOWN_MODEL in said("captures", "list") and SHOWN_MODEL in said("verify", prepared.capture_id)
    slug = prepared.model.source.id.replace(":", "-")
    url = f"file://{home}/store/{slug}/{study}"
    there = said("runs", "list", f"file://{home}/store") + said("runs", "show", url)
    assert prepared.model.source.id in there and "Ölmodell" not in there and "Akte" not in there
