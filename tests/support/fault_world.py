"""What all stories of `fault_table` share: a Prefect server and worker, an S3 server behind a gate, a model, a machine.

Nothing here patches the program. Before it: `fault_home`, `fault_gate`. After it: `fault_case`, one study.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import s3fs

from outliers.events.stream import JsonReporter
from outliers.spec import StudySpec
from outliers.steps import run_analyze, run_extract, run_report
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.fault_gate import Gate
from tests.support.fault_home import Home
from tests.support.remote import NetnsMachine
from tests.support.s3 import S3Server

SEQUENCES = 80
GRACE_SECONDS = 4.0
"""How long `reap` leaves a run alone that has not begun."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done at which step, and what came of it."""

    fault: str
    step: str
    state: str
    message: str
    then: str
    ended: str


@dataclass
class World:
    """What all cases share."""

    folder: Path
    home: Home
    s3: S3Server
    gate: Gate
    model: str
    text: Path
    digest: str = ""
    """results_digest of the study when nothing disturbs it."""
    host: NetnsMachine | None = None
    """A machine with a network of its own, where this process may make one."""
    rows: list[Row] = field(default_factory=list)

    def bucket(self) -> s3fs.S3FileSystem:
        """The bucket, past the gate."""
        keys = self.s3.writer
        return s3fs.S3FileSystem(
            key=keys.access_key,
            secret=keys.secret_key,
            client_kwargs={"endpoint_url": self.s3.endpoint, "region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )


@contextlib.contextmanager
def open_world(folder: Path, s3: S3Server, host: NetnsMachine | None = None) -> Iterator[World]:
    """A world, and its end: nothing of it runs afterwards."""
    gate = Gate(s3.ports["s3"])
    environment = s3.environment() | {"AWS_ENDPOINT_URL_S3": gate.endpoint, "OUTLIERS_HEARTBEAT_SECONDS": "1"}
    # a worker is gone after three of its heartbeats; `reap` waits no longer here than that
    environment |= {"PREFECT_WORKER_HEARTBEAT_SECONDS": "1", "OUTLIERS_REAP_GRACE_SECONDS": str(GRACE_SECONDS)}
    if host is not None:
        environment["OUTLIERS_SSH_CONFIG"] = str(host.config)
    # a few layers, a few heads: a sequence takes milliseconds
    model = tiny.make_model(
        folder / "model", "Llama", hidden_size=64, num_hidden_layers=6, max_position_embeddings=256, dtype="bfloat16"
    )
    text = folder / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; whoever counts its steps finds them even. " * 120)
    with Home(folder / "prefect", environment) as home:
        world = World(folder, home, s3, gate, model, text, host=host)
        world.digest = _undisturbed(world)
        try:
            yield world
        finally:
            gate.close()


def _undisturbed(world: World) -> str:
    """The digest of the study, made in this process: nothing between its steps can break."""
    place = open_workspace(world.folder / "undisturbed")
    study = prepare(StudySpec.model_validate(spec_of(world)), place)
    reporter = JsonReporter(place.root / "events.jsonl")
    run_extract(study, place, reporter)
    run_analyze(study, place, reporter)
    return str(run_report(study, place, reporter)["results_digest"])


def spec_of(world: World) -> dict[str, Any]:
    corpus = {"source": str(world.text), "num_sequences": SEQUENCES, "sequence_length": 64}
    return {"model": world.model, "corpus": corpus}
