"""Publishing, against a real S3 server and a real folder: whole or not at all, once, and never over another's numbers."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from outliers.errors import BadInput, DigestConflict, ForbiddenFile, PublishRefused, TargetError
from outliers.publish.manifest import read_manifest, write_manifest
from outliers.publish.publish import check_target, fetch, model_slug, publish, published_manifest
from outliers.publish.stores.open import opened
from tests.support.cases import first_here
from tests.support.publishing import Objects, hub, other, results, s3, start_publisher, target
from tests.support.results_folder import SLUG, STUDY_ID, finish, make_results

__all__ = ["hub", "other", "results", "s3", "target"]  # fixtures, found by name
pytestmark = pytest.mark.servers

NOISE = np.random.default_rng(0).bytes(5_000)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestOneStudy:
    def test_round_trip(self, target: str, results: Path, tmp_path: Path) -> None:
        check_target(target)
        assert published_manifest(target, SLUG, STUDY_ID) is None
        url = publish(results, target, SLUG)
        assert url == f"{target}/{SLUG}/{STUDY_ID}/manifest.json"
        manifest = read_manifest(results)
        assert published_manifest(target, SLUG, STUDY_ID) == manifest
        assert fetch(target, SLUG, STUDY_ID, tmp_path / "back") == manifest
        expected = files_of(results)
        del expected["run.log"]
        assert files_of(tmp_path / "back") == expected

    def test_layout(self, target: str, results: Path) -> None:
        publish(results, target, SLUG)
        manifest = read_manifest(results)
        assert manifest is not None
        inside = f"{SLUG}/{STUDY_ID}"
        named = {f"{inside}/{manifest['folder']}/{file['path']}" for file in manifest["files"]}
        assert set(Objects(target).seen()) == named | {f"{inside}/manifest.json"}

    def test_log_when_asked(self, target: str, results: Path) -> None:
        finish(results, log=True)
        publish(results, target, SLUG)
        assert sum(key.endswith("/run.log") for key in Objects(target).seen()) == 1

    def test_preflight_leaves_nothing(self, target: str) -> None:
        check_target(target)
        assert Objects(target).seen() == {}

    def test_second_time_changes_nothing(self, target: str, results: Path) -> None:
        url = publish(results, target, SLUG)
        before = Objects(target).seen()
        time.sleep(1.1)  # the server's clock has seconds
        assert publish(results, target, SLUG) == url
        assert Objects(target).seen() == before

    def test_same_numbers_in_other_bytes_change_nothing(self, target: str, results: Path, tmp_path: Path) -> None:
        publish(results, target, SLUG)
        before = Objects(target).seen()
        again = make_results(tmp_path / "again", manifest=False)
        (again / "summary.json").write_text(json.dumps(json.loads((again / "summary.json").read_text()), indent=2))
        finish(again)
        assert read_manifest(again) != read_manifest(results)
        time.sleep(1.1)
        publish(again, target, SLUG)
        assert Objects(target).seen() == before

    def test_other_numbers_are_refused(self, target: str, results: Path, other: Path) -> None:
        publish(results, target, SLUG)
        before = Objects(target).seen()
        with pytest.raises(DigestConflict) as caught:
            publish(other, target, SLUG)
        for folder in (results, other):
            manifest = read_manifest(folder)
            assert manifest is not None
            assert manifest["results_digest"] in str(caught.value)
        assert "--label NAME" in str(caught.value)
        assert Objects(target).seen() == before
        assert published_manifest(target, SLUG, STUDY_ID) == read_manifest(results)

    def test_two_studies_side_by_side(self, target: str, results: Path, tmp_path: Path) -> None:
        second = make_results(tmp_path / "second", seed=1, study_id="c" * 24)
        publish(results, target, SLUG)
        publish(second, target, SLUG)
        assert published_manifest(target, SLUG, STUDY_ID) == read_manifest(results)
        assert published_manifest(target, SLUG, "c" * 24) == read_manifest(second)


class TestRefusals:
    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
            lambda folder: (folder / "plots" / "late.bin").write_bytes(b"x"),
            lambda folder: (folder / "summary.json").write_text((folder / "summary.json").read_text() + " "),
            lambda folder: (folder / "tokens.json").write_text("{}"),
        ],
    )
    @pytest.mark.parametrize("target", first_here(["file", "s3", "hf"]), indirect=True)
    def test_folder_that_is_not_its_manifest(
        self, target: str, results: Path, change: Callable[[Path], object]
    ) -> None:
        change(results)
        with pytest.raises(ForbiddenFile):
            publish(results, target, SLUG)
        assert Objects(target).seen() == {}

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: (folder / "plots" / "late.png").write_bytes(NOISE),
            lambda folder: (folder / "plots" / "heatmap.png").write_bytes(NOISE),
            lambda folder: (folder / "report.html").write_bytes(b"<script>1</script>"),
            lambda folder: (folder / "report.html").unlink(),
        ],
    )
    @pytest.mark.parametrize("target", first_here(["file", "s3", "hf"]), indirect=True)
    def test_what_is_rendered_is_rendered_again(
        self, target: str, results: Path, change: Callable[[Path], object]
    ) -> None:
        before = files_of(results)
        change(results)
        publish(results, target, SLUG)
        assert files_of(results) == before
        del before["run.log"]
        stored = [Objects(target).read(key) for key in Objects(target).seen()]
        assert sorted(data or b"" for data in stored) == sorted(before.values())

    def test_manifest_of_other_numbers(self, target: str, results: Path) -> None:
        manifest = read_manifest(results)
        assert manifest is not None
        write_manifest(results, manifest | {"results_digest": "0" * 64})
        with pytest.raises(PublishRefused, match="does not belong"):
            publish(results, target, SLUG)
        assert Objects(target).seen() == {}

    def test_unfinished(self, target: str, results: Path) -> None:
        (results / "manifest.json").unlink()
        with pytest.raises(PublishRefused, match="not a finished study"):
            publish(results, target, SLUG)

    @pytest.mark.parametrize("data", [b"{", b"{}", b""])
    @pytest.mark.parametrize("target", first_here(["file", "s3", "hf"]), indirect=True)
    def test_malformed_publication(self, target: str, results: Path, data: bytes) -> None:
        Objects(target).put(f"{SLUG}/{STUDY_ID}/manifest.json", data)
        for act in (lambda: publish(results, target, SLUG), lambda: published_manifest(target, SLUG, STUDY_ID)):
            with pytest.raises(PublishRefused, match=r"manifest\.json"):
                act()
        assert Objects(target).read(f"{SLUG}/{STUDY_ID}/manifest.json") == data

    @pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
    @pytest.mark.parametrize("target", first_here(["file", "s3", "hf"]), indirect=True)
    def test_names_that_lead_elsewhere(self, target: str, name: str) -> None:
        with pytest.raises(BadInput):
            published_manifest(target, name, STUDY_ID)
        with pytest.raises(BadInput):
            published_manifest(target, SLUG, name)

    @pytest.mark.parametrize(
        "url",
        [
            *(
                "",
                "atlas",
                "http://x/y",
                "s3:///x",
                "file:///",
                "file://host/x",
                "s3://key:secret@bucket/x",
                "s3://b/x?y=1",
            ),
            *("hf://datasets/lab", "hf://lab/studies", "hf://datasets/lab/studies@main", "hf://datasets/lab/a/../b"),
            *(
                "hf://user:secret@datasets/lab/studies",
                "hf://models/lab/studies",
                "hf://datasets/lab/studies?token=secret",
            ),
        ],
    )
    def test_urls_that_are_no_target(self, url: str) -> None:
        with pytest.raises(TargetError) as caught:
            check_target(url)
        assert "secret" not in str(caught.value)


class TestFetch:
    def damage(self, target: str, results: Path, data: bytes | None) -> str:
        manifest = read_manifest(results)
        assert manifest is not None
        key = f"{SLUG}/{STUDY_ID}/{manifest['folder']}/summary.json"
        with opened(target) as store:
            store.delete(key)
            if data is not None:
                store.put(key, data)
        return key

    @pytest.mark.parametrize("data", [None, b"{}"])
    def test_damaged(self, target: str, results: Path, tmp_path: Path, data: bytes | None) -> None:
        publish(results, target, SLUG)
        back = tmp_path / "back"
        fetch(target, SLUG, STUDY_ID, back)
        key = self.damage(target, results, data)
        with pytest.raises(PublishRefused, match=key):
            fetch(target, SLUG, STUDY_ID, back)
        assert read_manifest(back) is None

    def test_not_published(self, target: str, tmp_path: Path) -> None:
        with pytest.raises(PublishRefused, match="not published"):
            fetch(target, SLUG, STUDY_ID, tmp_path / "back")

    @pytest.mark.parametrize("path", ["../../escaped", "/tmp/escaped", "plots/../../escaped.png", "manifest.json"])
    @pytest.mark.parametrize("target", first_here(["file", "s3", "hf"]), indirect=True)
    def test_manifest_that_leads_elsewhere(self, target: str, results: Path, tmp_path: Path, path: str) -> None:
        manifest = read_manifest(results)
        assert manifest is not None
        manifest["files"][0]["path"] = path
        Objects(target).put(f"{SLUG}/{STUDY_ID}/manifest.json", json.dumps(manifest).encode())
        with pytest.raises(PublishRefused, match="no place there"):
            fetch(target, SLUG, STUDY_ID, tmp_path / "a" / "b")


class TestOrphans:
    OLD, FRESH = "0123456789ab", "ba9876543210"

    def test_old_ones_go_and_young_ones_stay(self, results: Path, tmp_path: Path) -> None:
        target, study = f"file://{tmp_path}/atlas", tmp_path / "atlas" / SLUG / STUDY_ID
        for folder in (self.OLD, self.FRESH, "notes"):
            Objects(target).put(f"{SLUG}/{STUDY_ID}/{folder}/plots/a.png", b"x")
        hours_ago = time.time() - 4_000
        for folder in (self.OLD, "notes"):
            os.utime(study / folder / "plots" / "a.png", (hours_ago, hours_ago))
        publish(results, target, SLUG)
        own = (read_manifest(results) or {})["folder"]
        assert {path.name for path in study.iterdir()} == {own, self.FRESH, "notes", "manifest.json"}

    def test_the_published_folder_stays_however_old(self, results: Path, tmp_path: Path) -> None:
        target = f"file://{tmp_path}/atlas"
        publish(results, target, SLUG)
        for path in (tmp_path / "atlas").rglob("*"):
            os.utime(path, (0, 0))
        publish(results, target, SLUG)
        fetch(target, SLUG, STUDY_ID, tmp_path / "back")

    def test_young_ones_stay_in_a_bucket(self, s3: str, results: Path) -> None:
        Objects(s3).put(f"{SLUG}/{STUDY_ID}/{self.FRESH}/a", b"x")
        publish(results, s3, SLUG)
        assert f"{SLUG}/{STUDY_ID}/{self.FRESH}/a" in Objects(s3).seen()


class TestTwoAtOnce:
    @pytest.mark.studies
    def test_same_results(self, target: str, results: Path, tmp_path: Path) -> None:
        publishers = [start_publisher(results, target) for _ in range(3)]
        outputs = [publisher.communicate(timeout=120)[0] for publisher in publishers]
        assert [publisher.returncode for publisher in publishers] == [0, 0, 0], outputs
        assert len(set(outputs)) == 1
        fetch(target, SLUG, STUDY_ID, tmp_path / "back")

    @pytest.mark.studies
    def test_different_results(self, target: str, results: Path, other: Path, tmp_path: Path) -> None:
        publishers = [start_publisher(folder, target) for folder in (results, other)]
        outputs = [publisher.communicate(timeout=120)[0] for publisher in publishers]
        codes = [publisher.returncode for publisher in publishers]
        assert sorted(codes) == [0, 3], outputs
        assert outputs[codes.index(3)].startswith("DigestConflict")
        winner = (results, other)[codes.index(0)]
        assert fetch(target, SLUG, STUDY_ID, tmp_path / "back") == read_manifest(winner)

    def test_one_winner_of_the_manifest(self, target: str) -> None:
        # the step that all rests on, without anything around it that could hide a second winner
        won: list[bool] = []
        ready = threading.Barrier(8)

        def race(n: int) -> None:
            with opened(target) as store:
                store.read("warm")
                ready.wait(300)  # eight clients take their time on a busy machine
                won.append(store.create("a/manifest.json", b"%d" % n))

        racers = [threading.Thread(target=race, args=(n,)) for n in range(8)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sorted(won) == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("model_id", "slug"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen--Qwen3-30B-A3B"),
        ("builtin:smollm2", "builtin-smollm2"),
        ("local:abc", "local-abc"),
        ("gpt2", "gpt2"),
        ("../../etc", "etc"),
        ("a b/c?d#e", "a-b--c-d-e"),
    ],
)
def test_slugs(model_id: str, slug: str) -> None:
    assert model_slug(model_id) == slug


def test_long_slugs_differ() -> None:
    slugs = {model_slug("x" * 200 + end) for end in ("", "a", "b")}
    assert len(slugs) == 3
    assert max(map(len, slugs)) <= 100


@pytest.mark.parametrize("model_id", ["", "..", "/", "模型"])
def test_no_slug(model_id: str) -> None:
    with pytest.raises(BadInput):
        model_slug(model_id)
