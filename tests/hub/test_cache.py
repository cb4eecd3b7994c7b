"""The hub's cache: what is here and what is still to come, and whose variables move it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outliers.errors import UnknownModel
from outliers.hub.cache import CACHE_VARIABLES, CachedModel, cache_for, cache_is_chosen, cached_model

COMMIT = "c" * 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CachedModel:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = cache_for("org/name", COMMIT)
    assert found.folder == tmp_path / "hub" / "models--org--name"
    found.snapshot.mkdir(parents=True)
    return found


@pytest.mark.parametrize("name", CACHE_VARIABLES)
def test_each_of_the_hubs_variables_moves_the_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in CACHE_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    assert not cache_is_chosen()
    monkeypatch.setenv(name, "/elsewhere")
    assert cache_is_chosen()


def test_a_model_in_one_file(place: CachedModel) -> None:
    assert (place.missing_file(), place.missing_weight_bytes(900)) == ("config.json", 900)
    (place.snapshot / "config.json").write_text("{}")
    assert place.missing_file() == "model.safetensors"
    assert cached_model("org/name", COMMIT) is None
    (place.snapshot / "model.safetensors").write_bytes(b"w" * 900)
    assert (place.missing_file(), place.missing_weight_bytes(900)) == (None, 0)
    assert cached_model("org/name", COMMIT) == place.snapshot


def test_an_index_that_is_damaged_is_refused_in_words(place: CachedModel) -> None:
    (place.snapshot / "config.json").write_text("{}")
    index = place.snapshot / "model.safetensors.index.json"
    for content in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(content))
        for ask in (place.missing_file, lambda: place.missing_weight_bytes(1)):
            with pytest.raises(UnknownModel, match="has no weight_map of names to files"):
                ask()
