"""The database that a new home of Prefect's server begins with."""

from __future__ import annotations

import pytest

from flows.server.served import DATABASE, SEED, seed


def test_a_new_home_begins_with_a_copy(tmp_path, monkeypatch):
    (tmp_path / "seed.db").write_bytes(b"made before")
    monkeypatch.setenv(SEED, str(tmp_path / "seed.db"))
    seed(tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == [DATABASE]
    assert (tmp_path / "home" / DATABASE).read_bytes() == b"made before"
    assert (tmp_path / "seed.db").stat().st_nlink == 1, "what the server writes stays in its home"


def test_a_database_that_is_there_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "seed.db").write_bytes(b"made before")
    (tmp_path / DATABASE).write_bytes(b"in use")
    monkeypatch.setenv(SEED, str(tmp_path / "seed.db"))
    seed(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == b"in use"


def test_a_seed_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(SEED, str(tmp_path / "none.db"))
    with pytest.raises(FileNotFoundError):
        seed(tmp_path / "home")
    assert not list((tmp_path / "home").iterdir())
    monkeypatch.delenv(SEED)
    seed(tmp_path / "other")
    assert not (tmp_path / "other").exists()
