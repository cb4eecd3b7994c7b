"""A data set of the hub as an artifact store: one commit a study, never two winners, and errors that say what to do.

The hub is a server on loopback that takes commits as the hub does; the client is huggingface_hub itself. What every store is
held to is in `test_publish`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback

import pytest

from outliers.errors import AccessDenied, BadInput, DigestConflict, PublishRefused, StoreUnavailable, TargetError
from outliers.hub.datasets import DatasetRepo
from outliers.publish.publish import check_target, fetch, publish, published_manifest
from outliers.publish.shelf import read_store, read_study
from outliers.publish.stores.dataset import DatasetStore
from outliers.publish.stores.open import opened
from tests.support.commands import run_command
from tests.support.hub_server import Fault, Repo, client_environment, commit_id
from tests.support.publishing import DATASET, WRITER, Objects, hub, other, results
from tests.support.results_folder import SLUG, STUDY_ID, make_results

__all__ = ["hub", "other", "results"]  # fixtures, found by name
pytestmark = pytest.mark.servers

TARGET = f"hf://datasets/{DATASET}/atlas"
COMMIT = "POST .*/commit/main"


def repo_of(hub):
    return hub.find("datasets", DATASET)


def test_a_study_is_one_commit_of_small_and_large_files(hub, results):
    before = len(repo_of(hub).commits)
    publish(results, TARGET, SLUG)
    repo = repo_of(hub)
    assert len(repo.commits) == before + 1
    # Parquet went where large files go, the rest in the commit itself
    assert sorted(hub.uploaded.values()) == sorted(
        data for path, data in repo.commits[repo.branches["main"]].items() if path.endswith(".parquet")
    )
    assert len(hub.uploaded) == 1
    assert {path.partition("/")[0] for path in repo.commits[repo.branches["main"]]} == {
        "atlas",
        ".gitattributes",
        "README.md",
    }


def test_the_top_of_a_data_set_is_a_store_too(hub, results, tmp_path):
    target = f"hf://datasets/{DATASET}"
    publish(results, target, SLUG)
    found = read_store(target, summaries=True)
    # its README is no study, and nothing strange
    assert [study.manifest["study_id"] for study in found.studies] == [STUDY_ID]
    assert found.skipped == ()
    fetch(target, SLUG, STUDY_ID, tmp_path / "back")


def test_a_commit_that_came_first_is_looked_at_again(hub, results):
    hub.faults.append(Fault(COMMIT, status=412, times=2))
    url = publish(results, TARGET, SLUG)
    assert url == f"{TARGET}/{SLUG}/{STUDY_ID}/manifest.json"
    assert [asked.status for asked in hub.requests(COMMIT)] == [412, 412, 200]


class Overtaken(DatasetRepo):
    """A repository to which somebody commits after the head was read and before this process does."""

    def __init__(self, repo, overtake):
        super().__init__(repo)
        self.overtake = overtake

    def commit(self, files, remove, parent, message):
        if self.overtake is not None:
            act, self.overtake = self.overtake, None
            act()
        return super().commit(files, remove, parent, message)


def test_who_is_overtaken_sees_the_other_s_key_and_changes_nothing(hub):
    def first():
        with opened(TARGET) as store:
            assert store.create_with({"a/x": b"theirs"}, "a/manifest.json", b"first")

    store = DatasetStore(TARGET, Overtaken(DATASET, first), "atlas")
    assert not store.create_with({"a/x": b"ours", "a/y": b"ours"}, "a/manifest.json", b"second")
    assert Objects(TARGET).read("a/manifest.json") == b"first"
    assert Objects(TARGET).read("a/x") == b"theirs"
    assert set(Objects(TARGET).seen()) == {"a/x", "a/manifest.json"}


def test_who_is_overtaken_by_something_else_writes_upon_it(hub):
    store = DatasetStore(TARGET, Overtaken(DATASET, lambda: Objects(TARGET).put("b/z", b"z")), "atlas")
    assert store.create_with({"a/x": b"ours"}, "a/manifest.json", b"ours")
    assert set(Objects(TARGET).seen()) == {"a/x", "a/manifest.json", "b/z"}


def test_of_many_at_once_one_wins(hub):
    won, errors = [], []

    def write(number):
        try:
            with opened(TARGET) as store:
                if store.create_with({f"a/{number}": b"x"}, "a/manifest.json", b"%d" % number):
                    won.append(number)
        except StoreUnavailable as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(won) == 1
    assert set(Objects(TARGET).seen()) == {f"a/{won[0]}", "a/manifest.json"}
    assert Objects(TARGET).read("a/manifest.json") == b"%d" % won[0]


def test_other_numbers_are_refused(hub, results, other):
    publish(results, TARGET, SLUG)
    head = repo_of(hub).branches["main"]
    with pytest.raises(DigestConflict):
        publish(other, TARGET, SLUG)
    assert repo_of(hub).branches["main"] == head


def test_an_answer_that_is_lost_after_the_commit(hub, results, tmp_path):
    hub.faults.append(Fault(COMMIT, lost=True))
    publish(results, TARGET, SLUG)
    assert len(hub.requests(COMMIT)) == 1
    fetch(TARGET, SLUG, STUDY_ID, tmp_path / "back")


def test_a_hub_that_fails_leaves_nothing_half(hub, results):
    for fault in (
        Fault("PUT /cdn/", status=403),
        Fault(COMMIT, status=500),
        Fault(".*/preupload/", status=403),
    ):
        hub.faults.append(fault)
        with pytest.raises((StoreUnavailable, PublishRefused)) as caught:
            publish(results, TARGET, SLUG)
        assert "\n" not in str(caught.value)
        assert Objects(TARGET).seen() == {}
        hub.forget()
    publish(results, TARGET, SLUG)


@pytest.mark.parametrize(("modified", "kept"), [(1_000_000_000.0, False), (None, True)])
def test_a_folder_without_a_manifest_is_removed_only_where_it_is_known_to_be_old(hub, results, modified, kept):
    publish(results, TARGET, SLUG)
    orphan = f"{SLUG}/{STUDY_ID}/{'f' * 12}/summary.json"
    Objects(TARGET).put(orphan, b"x")
    repo_of(hub).modified = modified
    publish(results, TARGET, SLUG)
    assert (Objects(TARGET).read(orphan) is not None) == kept


def test_a_store_that_was_listed_sees_what_it_writes(hub):
    with opened(TARGET) as store:
        assert store.children("").folders == []
        assert store.create("a/manifest.json", b"x")
        assert store.read("a/manifest.json") == b"x"
        assert store.children("").folders == ["a"]


def test_a_token_file_that_can_not_be_read_is_an_error_of_ours(hub, results, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))  # a folder
    with pytest.raises(StoreUnavailable, match="data set lab/studies"):
        check_target(TARGET)


def test_commits_that_never_fit_are_given_up(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults.append(Fault(COMMIT, status=412, times=99))
    with pytest.raises(StoreUnavailable, match="pull requests"), opened(TARGET) as store:
        store.put("a", b"x")
    assert len(hub.requests(COMMIT)) == 8


def test_a_silent_hub_is_waited_for_within_bounds(hub):
    hub.faults.append(Fault("GET /api/datasets/", stall_after=0))
    repo = DatasetRepo(DATASET, call_seconds=0.5)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"within 0 s"):
        repo.head()
    assert time.monotonic() - began < 5


def test_what_the_repository_ignores_is_refused_before_and_at_the_commit(hub, results):
    repo = repo_of(hub)
    repo.commits[repo.branches["main"]][".gitignore"] = b"# pictures\n*.png\n"
    for act in (lambda: check_target(TARGET), lambda: publish(results, TARGET, SLUG)):
        with pytest.raises(TargetError, match=r"\.gitignore"):
            act()
    assert Objects(TARGET).seen() == {}


class TestRights:
    def refusals(self, target, results, kind, *words):
        for act in (lambda: check_target(target), lambda: publish(results, target, SLUG)):
            with pytest.raises(kind) as caught:
                act()
            whole = "".join(traceback.format_exception(caught.value))
            assert "hf_the" not in whole
            assert "\n" not in str(caught.value)
            for word in words:
                assert word in str(caught.value)

    def test_no_such_data_set(self, hub, results):
        self.refusals("hf://datasets/lab/none", results, TargetError, "no such data set", "hf repo create lab/none")

    def test_no_token(self, hub, results, monkeypatch, tmp_path):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        self.refusals(TARGET, results, AccessDenied, "HF_TOKEN")

    def test_a_token_that_may_read_alone(self, hub, results, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_theReaderOfTheTests")
        self.refusals(TARGET, results, AccessDenied, "may not", "403", "HF_TOKEN")
        assert published_manifest(TARGET, SLUG, STUDY_ID) is None

    def test_a_token_with_a_line_break(self, hub, results, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_the\x0bBrokenOne")
        self.refusals(TARGET, results, AccessDenied, "characters that no token has")

    def test_a_hub_that_is_switched_off(self, hub, results, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.refusals(TARGET, results, TargetError, "HF_HUB_OFFLINE")

    def test_the_preflight_leaves_nothing(self, hub):
        head = repo_of(hub).branches["main"]
        check_target(TARGET)
        assert repo_of(hub).branches["main"] == head
        assert not hub.requests("POST|PUT")

    def test_a_private_data_set(self, hub, results, monkeypatch):
        repo_of(hub).private, repo_of(hub).tokens = True, (WRITER,)
        check_target(TARGET)
        publish(results, TARGET, SLUG)
        monkeypatch.setenv("HF_TOKEN", "hf_theReaderOfTheTests")
        with pytest.raises(TargetError, match="no such data set"):
            published_manifest(TARGET, SLUG, STUDY_ID)

    def test_no_log_shows_the_token(self, hub, results, caplog):
        caplog.set_level(logging.DEBUG)
        publish(results, TARGET, SLUG)
        assert caplog.records
        assert WRITER not in caplog.text


class TestReading:
    @pytest.fixture
    def two(self, hub, results, tmp_path):
        publish(results, TARGET, SLUG)
        publish(make_results(tmp_path / "second", seed=1, study_id="c" * 24), TARGET, SLUG)
        hub.forget()
        return hub

    def test_a_store_is_listed_at_one_commit_in_one_listing(self, two):
        two.page = 7  # names an answer, so that a listing has pages
        found = read_store(TARGET, summaries=True)
        assert {study.manifest["study_id"] for study in found.studies} == {STUDY_ID, "c" * 24}
        assert all(study.summary for study in found.studies)
        assert found.skipped == ()
        assert len(two.requests("GET /api/datasets/[^/]+/[^/]+/revision")) == 1
        listings = two.requests("GET .*/tree/")
        names = len(repo_of(two).commits[repo_of(two).branches["main"]])
        assert len(listings) < names  # pages of one listing, and not one listing a folder

    def test_one_study(self, two):
        assert read_study(f"{TARGET}/{SLUG}/{STUDY_ID}").manifest["study_id"] == STUDY_ID
        with pytest.raises(BadInput, match="outliers runs list"):
            read_study(f"{TARGET}/{SLUG}/nothing")

    def test_a_file_that_is_larger_than_its_manifest_says(self, two):
        with opened(TARGET) as store, pytest.raises(PublishRefused, match="more than the 10 bytes"):
            store.read(f"{SLUG}/{STUDY_ID}/manifest.json", 10)

    def test_an_empty_store(self, hub):
        with pytest.raises(BadInput, match="no published study yet"):
            read_store(TARGET, summaries=False)

    def test_the_commands(self, two, tmp_path):
        environment = client_environment(two.url, tmp_path / "home", HF_TOKEN="hf_theReaderOfTheTests")

        def outliers(*words):
            done = run_command(tmp_path, *words, environment=environment)
            assert done.returncode == 0, done.stderr
            assert "hf_the" not in done.stdout + done.stderr
            return done.stdout

        listed = json.loads(outliers("runs", "list", TARGET, "--json", "--workspace", tmp_path))
        assert {item["study_id"] for item in listed["studies"]} == {STUDY_ID, "c" * 24}
        assert STUDY_ID in outliers("runs", "show", f"{TARGET}/{SLUG}/{STUDY_ID}", "--workspace", tmp_path)
        outliers("atlas", TARGET, "--out", "atlas.html")
        assert STUDY_ID in (tmp_path / "atlas.html").read_text()
        page = f"https://huggingface.co/datasets/{DATASET}/tree/main/atlas/{SLUG}/{STUDY_ID}"
        assert page in outliers("card", f"{TARGET}/{SLUG}/{STUDY_ID}", "--workspace", tmp_path)


def test_names_of_a_repository_that_only_begin_alike(hub):
    with opened(TARGET) as store:
        store.put("a/x", b"1")
    with opened(f"{TARGET}-2") as store:
        store.put("a/y", b"2")
    with opened(TARGET) as store:
        assert store.children("").folders == ["a"]
        assert set(store.list("")) == {"a/x"}
        store.delete("a/x")
        store.delete("a/x")
        assert store.read("a/x") is None
        assert store.list("") == {}


def test_the_first_commit_of_a_repository_is_not_ours(hub):
    hub.repos.append(
        Repo("datasets", "lab/bare", {commit_id("bare"): {}}, {"main": commit_id("bare")}, writers=(WRITER,))
    )
    check_target("hf://datasets/lab/bare")
    with opened("hf://datasets/lab/bare") as store:
        assert store.create("a/manifest.json", b"x")
        assert not store.create("a/manifest.json", b"y")
