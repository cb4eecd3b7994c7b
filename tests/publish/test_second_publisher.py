"""Two publishers of one study at once: the second leaves nothing that no manifest names."""

from __future__ import annotations

import contextlib
from pathlib import Path

import outliers.publish.publish as publishing
from outliers.publish.publish import publish_study
from outliers.publish.publishable import read_publishable
from outliers.publish.stores.base import create_in_order
from outliers.publish.stores.open import opened
from tests.support.results_folder import SLUG, STUDY_ID, finish, make_results


class Late:
    """A store to which another publisher is faster, just before the manifest."""

    def __init__(self, store, other):
        self._store, self._other = store, other

    def __getattr__(self, name):
        return getattr(self._store, name)

    def create(self, key, data):
        self._other()
        return self._store.create(key, data)

    def create_with(self, files, key, data):
        return create_in_order(self, files, key, data)


def test_what_was_put_too_late_is_taken_back(tmp_path, monkeypatch):
    results, target = tmp_path / "results", f"file://{tmp_path}/store"
    make_results(results)
    finish(results)
    mine = read_publishable(results)
    finish(results, log=True)
    other = read_publishable(results)
    assert mine.manifest["folder"] != other.manifest["folder"]

    @contextlib.contextmanager
    def late(url):
        with opened(url) as store:
            monkeypatch.setattr(publishing, "opened", opened)
            yield Late(store, lambda: publish_study(other, target, SLUG))

    monkeypatch.setattr(publishing, "opened", late)
    publish_study(mine, target, SLUG)
    there = {path.relative_to(tmp_path / "store") for path in (tmp_path / "store").rglob("*") if path.is_file()}
    place = Path(SLUG) / STUDY_ID
    named = {place / other.manifest["folder"] / file["path"] for file in other.manifest["files"]}
    assert there == named | {place / "manifest.json"}
