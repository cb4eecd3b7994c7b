"""Publishing in tests: targets that are a real S3 server and a real folder, finished studies, a publisher as a process.

The server is that of `s3`. `test_publish`, `test_publish_rights` and `test_publish_outages` import the fixtures by name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from huggingface_hub import constants

from outliers.publish.stores.base import Stored
from outliers.publish.stores.open import opened
from tests.support.hub_server import Hub, Repo, commit_id, hub_server
from tests.support.results_folder import SLUG, make_results
from tests.support.s3 import BUCKET, S3Server, environment

DATASET, WRITER = "lab/studies", "hf_theWriterOfTheTests"

PUBLISHER = """
import sys
from pathlib import Path
from outliers.publish.manifest import build_manifest
from outliers.publish.publish import publish_study
from outliers.publish.publishable import Publishable, read_publishable
try:
    study = read_publishable(Path(sys.argv[1]))
    more = {f"plots/more-{n}.png": bytes(1000) for n in range(int(sys.argv[4]))}
    if more:  # a study takes a while to publish
        files = dict(study.files) | more
        study = Publishable(build_manifest(files, spec={}, provenance={}), files)
    print(publish_study(study, sys.argv[2], sys.argv[3]))
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def start_publisher(results: Path, target: str, more: int = 0) -> subprocess.Popen[str]:
    """A publisher in its own process, with this process's keys; `more`: files that it publishes in addition to the study's."""
    command = [sys.executable, "-c", PUBLISHER, str(results), target, SLUG, str(more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@dataclass
class Objects:
    """All that lies at a target, with what would show a second writing."""

    target: str

    def seen(self) -> dict[str, Stored]:
        with opened(self.target) as store:
            return store.list("")

    def put(self, key: str, data: bytes) -> None:
        with opened(self.target) as store:
            store.put(key, data)

    def read(self, key: str) -> bytes | None:
        with opened(self.target) as store:
            return store.read(key)


@pytest.fixture
def s3(s3_server: S3Server) -> Iterator[str]:
    """A new prefix of the bucket, this process being the writer."""
    s3_server.start()
    with environment(s3_server.environment()):
        yield f"s3://{BUCKET}/{uuid4().hex}/atlas"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the data set DATASET, this process being its writer. It keeps Parquet files as large ones, as the hub does."""
    first = {".gitattributes": b"*.parquet filter=lfs\n", "README.md": b"# Studies\n"}
    repo = Repo("datasets", DATASET, {commit_id("first"): first}, {"main": commit_id("first")})
    repo.writers, repo.large = (WRITER,), r"\.parquet$"
    with hub_server(repo) as running:
        # of this process, which has imported the library, and of those that it starts
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # the server of the tests has no Xet; huggingface_hub 1 asks it, 2 goes by what is installed
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        plain = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, value in {"HF_ENDPOINT": running.url, "HF_TOKEN": WRITER, **plain}.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture(params=["s3", "file", "hf"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    if request.param == "hf":
        request.getfixturevalue("hub")
        return f"hf://datasets/{DATASET}/atlas"
    return f"file://{tmp_path}/atlas"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same study from other hardware."""
    return make_results(tmp_path / "other", seed=1)
