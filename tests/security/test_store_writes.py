"""Publishing into a folder that others write to: nothing is written through a link, nothing is waited for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from outliers.errors import BadInput, PublishRefused
from outliers.publish.manifest import MAX_MANIFEST_BYTES
from outliers.publish.publish import publish
from outliers.publish.shelf import read_store
from outliers.publish.stores.open import opened
from tests.security.stores import FILES, in_time
from tests.support.atlas_store import MODELS, objects, study
from tests.support.results_folder import SLUG, STUDY_ID, make_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results")


@pytest.mark.parametrize("step", ["model", "study", "folder", "plots"])
def test_nothing_is_published_through_a_link(tmp_path: Path, results: Path, step: str) -> None:
    target, outside = tmp_path / "atlas", tmp_path / "outside"
    outside.mkdir()
    manifest = json.loads((results / "manifest.json").read_text())
    steps = {"model": SLUG, "study": STUDY_ID, "folder": manifest["folder"], "plots": "plots"}
    place = target
    for name, part in steps.items():
        if name == step:
            place.mkdir(parents=True, exist_ok=True)
            (place / part).symlink_to(outside)
            break
        place = place / part
    with pytest.raises(PublishRefused, match="symbolic link, which is not followed"):
        in_time(lambda: publish(results, f"file://{target}", SLUG))
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "a folder"])
def test_publishing_waits_for_nothing_that_stands_in_the_place_of_a_manifest(
    tmp_path: Path, results: Path, kind: str
) -> None:
    place = tmp_path / "atlas" / SLUG / STUDY_ID
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(b"")
    FILES[kind][0](place / "manifest.json")
    before = (place / "manifest.json").lstat()
    with pytest.raises(PublishRefused, match="remove it there"):
        in_time(lambda: publish(results, f"file://{tmp_path}/atlas", SLUG))
    assert (place / "manifest.json").lstat().st_ino == before.st_ino


def test_a_file_that_is_a_link_is_replaced_and_not_written_through(tmp_path: Path, results: Path) -> None:
    manifest = json.loads((results / "manifest.json").read_text())
    folder, victim = tmp_path / "atlas" / SLUG / STUDY_ID / manifest["folder"], tmp_path / "victim"
    folder.mkdir(parents=True)
    victim.write_text("mine")
    (folder / "summary.json").symlink_to(victim)
    publish(results, f"file://{tmp_path}/atlas", SLUG)
    assert victim.read_text() == "mine"
    assert not (folder / "summary.json").is_symlink()


def test_the_files_of_a_target_are_for_others_to_read(tmp_path: Path, results: Path) -> None:
    before = os.umask(0o022)
    try:
        publish(results, f"file://{tmp_path}/atlas", SLUG)
    finally:
        os.umask(before)
    for path in (tmp_path / "atlas").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a//b", "", ".", "a/./b", "a\0b"])
def test_a_key_leads_nowhere_else(tmp_path: Path, key: str) -> None:
    with opened(f"file://{tmp_path}/atlas") as store:
        for do in (
            lambda: store.read(key),
            lambda: store.put(key, b"x"),
            lambda: store.create(key, b"x"),
            lambda: store.delete(key),
        ):
            with pytest.raises(BadInput):
                do()
    assert list(tmp_path.rglob("x")) == []


@pytest.mark.servers
def test_an_object_of_a_bucket_is_read_up_to_its_limit(s3_server: Any) -> None:
    from uuid import uuid4

    from tests.support.s3 import BUCKET, environment

    s3_server.start()
    url = f"s3://{BUCKET}/{uuid4().hex}"
    with environment(s3_server.environment()):
        place, put = objects(study(1, MODELS[0]), {})
        with opened(url) as store:
            for path, data in put.items():
                store.put(f"{place}/{path}", data)
            store.put(f"{place[:-1]}9/manifest.json", b" " * (MAX_MANIFEST_BYTES + 1))
            store.put("small", b"")
            assert store.read("small") == b""
            assert store.read("none") is None
            assert store.read(f"{place}/manifest.json", len(put["manifest.json"])) == put["manifest.json"]
            with pytest.raises(PublishRefused, match="has 12 bytes, at most 11 are read"):
                store.put("twelve", b"x" * 12)
                store.read("twelve", 11)
        shelf = read_store(url, summaries=True)
    assert len(shelf.studies) == 1
    assert [item.why for item in shelf.skipped if f"has {MAX_MANIFEST_BYTES + 1:,} bytes" in item.why]
