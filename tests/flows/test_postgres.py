"""Prefect on Postgres, for many workers: a real Debian Postgres, a real server on it, two workers, two studies at once.

`make test-postgres` installs Postgres where it is missing and runs this; plain `make test` doesn't.
"""

from __future__ import annotations

import os

import pytest

from tests.support import postgres, tiny
from tests.support.prefect_home import PrefectHome

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(
        os.environ.get("OUTLIERS_TEST_POSTGRES") != "1" or postgres.programs() is None,
        reason="`make test-postgres` runs this",
    ),
]
STUDY = {"source": "builtin:python-docs", "sequence_length": 256}


class TwoWorkers(PrefectHome):
    """A server with two workers that take one run each."""

    def __enter__(self) -> TwoWorkers:
        super().__enter__()
        # the one that took all is replaced
        worker = self._processes.pop()
        worker.terminate()
        worker.wait(30)
        for name in ("first", "second"):
            self._spawn(name, "worker", "start", "--pool", "outliers", "--name", name, "--limit", "1")
        return self


@pytest.fixture(scope="module")
def database():
    with postgres.Postgres() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory, database):
    settings = {"PREFECT_API_DATABASE_CONNECTION_URL": database.url}
    with TwoWorkers(tmp_path_factory.mktemp("prefect"), settings) as running:
        yield running


def test_two_workers_run_two_studies_at_once(home, database, tmp_path):
    model = tiny.make_model(
        tmp_path / "model", "Llama", hidden_size=64, num_hidden_layers=8, max_position_embeddings=2048
    )
    runs = [
        home.run(
            model=model,
            corpus=STUDY | {"num_sequences": number},
            compute={"workspace": str(tmp_path / "workspace")},
        )
        for number in (150, 151)
    ]
    done = [home.wait(run, "Completed", "Failed", "Crashed") for run in runs]
    assert [run["state_name"] for run in done] == ["Completed", "Completed"], "\n".join(map(home.logs, runs))
    assert max(run["start_time"] for run in done) < min(run["end_time"] for run in done)
    workers = {name for run in runs for name in ("first", "second") if f"Worker '{name}' submitting" in home.logs(run)}
    assert workers == {"first", "second"}

    # it is all in Postgres, and no SQLite file was made beside it
    assert set(database.query("select id from flow_run").split()) >= set(runs)
    assert int(database.query("select count(*) from artifact where type = 'markdown'")) == 2
    assert not (home.folder / "home" / "prefect.db").exists()


def test_the_history_outlives_the_database_server(home, database):
    before = {run["id"]: run["state_name"] for run in home.flow_runs()}
    database.stop()
    database.start()
    home._await(lambda: {run["id"]: run["state_name"] for run in _runs(home)} == before, "the same history", 60)


def _runs(home):
    try:
        return home.flow_runs()
    except OSError:  # the server's connections are made anew
        return []
