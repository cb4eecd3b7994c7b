"""Faults: whatever kills the process, cuts the power, fills the disk or flips a bit, no capture is ever silently wrong."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from outliers.capture.extract import extract
from outliers.store.chunks import Journal
from outliers.store.repair import MARK
from outliers.store.verify import verify
from outliers.study.ring_size import ring_slots, writer_count
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.synthetic import Silent
from tests.support.zygote import Zygote

pytestmark = pytest.mark.servers

SITES = ("attn_in", "mlp_in", "o_in", "resid")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """More tensors a batch than the ring has slots, and chunks of 256 KiB: few batches in flight, writers often in one."""
    return tiny.make_model(
        tmp_path_factory.mktemp("deep"), "Llama", num_hidden_layers=16, hidden_size=64, max_position_embeddings=1024
    )


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as process:
        yield process


def content(workspace, study):
    """Every file of a capture but its journal, diary, mark of a repair and summaries, by name, and the journal's entries."""
    root = workspace.capture(study.capture_id)
    aside = {"lock", "journal.jsonl", "extractions.jsonl", MARK}
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    kept = {name: data for name, data in files.items() if name not in aside and not name.startswith("summaries")}
    return kept, entries(workspace, study)


def entries(workspace, study):
    done = Journal.open(workspace.capture(study.capture_id) / "journal.jsonl").done
    return {s: {key: value for key, value in entry.items() if key != "line_crc32"} for s, entry in done.items()}


def assert_identical(one, other, study):
    (files, journal), (others, other_journal) = content(one, study), content(other, study)
    assert set(files) == set(others)
    assert [name for name in files if files[name] != others[name]] == []
    assert journal == other_journal
    assert sorted(journal) == list(range(study.corpus.num_sequences))


# When to strike. Each takes the random source and the capture's folder, and gives a question that is asked all the time.


def first_instants(chance, folder):
    return after(chance.uniform(0, 0.04))


def while_arrays_are_made(chance, folder):
    begun = (folder / "activations.zarr").exists
    return then(begun, lambda: after(chance.uniform(0, 0.012)))


def when_described(chance, folder):
    return lambda: any(folder.glob("*capture.json*"))


def while_loading(chance, folder):
    return then((folder / "capture.json").exists, lambda: after(chance.uniform(0, 0.12)))


def by_the_clock(chance, folder):
    return after(chance.uniform(0, 1.2))


def in_mid_chunk(chance, folder):
    site = folder / "activations.zarr" / chance.choice(SITES)
    return then(more_chunks(chance, site), lambda: lambda: being_written(site))


def as_chunks_are_written(chance, folder):
    return more_chunks(chance, folder / "activations.zarr" / chance.choice(SITES))


def at_the_journal(chance, folder):
    journal, lines = folder / "journal.jsonl", chance.randint(1, 3)
    began = journal.stat().st_size if journal.exists() else 0
    return lambda: (
        journal.exists() and journal.stat().st_size > began and lines <= journal.read_bytes()[began:].count(10)
    )


def after(seconds):
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def then(first, make_second):
    second = None

    def now():
        nonlocal second
        if second is None and first():
            second = make_second()
        return second is not None and second()

    return now


def more_chunks(chance, site):
    target = sum(1 for _ in site.glob("c.*")) + chance.randint(1, 40)
    return lambda: sum(1 for _ in site.glob("c.*")) >= target


def being_written(site):
    """Whether there is a part of a chunk under its temporary name."""
    try:
        with os.scandir(site) as found:
            return any(entry.stat().st_size for entry in found if entry.name.startswith(".c."))
    except FileNotFoundError:
        return False  # renamed while we looked


BEGINNING = (first_instants, while_arrays_are_made, while_arrays_are_made, when_described, while_loading)
MIDDLE = (
    *(in_mid_chunk, in_mid_chunk, in_mid_chunk, in_mid_chunk, in_mid_chunk),
    *(at_the_journal, at_the_journal, at_the_journal, as_chunks_are_written, as_chunks_are_written, by_the_clock),
)


MORE_CAPTURES = 6
"""Captures that are killed in the middle of chunks alone, until enough chunks were torn."""


@dataclasses.dataclass
class Storm:
    """Attempts at one capture and what came of them. `begun`: sequences that went into the model in all attempts."""

    study: Any
    workspace: Any
    place: Path
    kills: int = 0
    torn: int = 0
    """Kills that left chunks half-written, or written and not named yet."""
    short: int = 0
    """Those that left one shorter than it should be."""

    @property
    def folder(self):
        return self.workspace.capture(self.study.capture_id)

    @property
    def begun(self):
        return sum(int(line) for line in (self.place / "log").read_text().splitlines() if line.isdigit())

    @property
    def recomputed(self):
        return self.begun - self.study.corpus.num_sequences

    def blow(self, zygote, chance, strikes):
        """Kill attempt after attempt as `strikes` say, then let one through."""
        (self.place / "prepared.json").write_text(self.study.model_dump_json())
        for make in strikes:
            strike = make(chance, self.folder)
            pid = zygote.extract(self.place / "prepared.json", self.workspace.root, self.place / "log")
            while not strike() and alive(pid):
                time.sleep(0.0002)
            os.kill(pid, signal.SIGKILL)
            code = zygote.wait()
            if code == 0:
                return
            assert code == -signal.SIGKILL, (self.place / "log").read_text()
            self.kills += 1
            self.examine()
        zygote.extract(self.place / "prepared.json", self.workspace.root, self.place / "log")
        assert zygote.wait() == 0, (self.place / "log").read_text()

    def examine(self):
        """What the journal says must hold at every instant, not only at the end."""
        left = [path.stat().st_size for path in self.folder.rglob(".c.*.tmp")]
        chunk = self.study.spec.corpus.sequence_length * self.study.model.hidden_size * 4
        self.torn += bool(left)
        self.short += any(size < chunk for size in left)
        if (self.folder / "capture.json").exists():
            found = verify(self.folder, Silent())
            assert found.sound, found.message()


def alive(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"


def batches_in_flight(study):
    """Batches that can be begun and not journaled: one that each writer waits for the disk with, and those that the ring's
    slots, consecutive tensors, can belong to."""
    tensors = len(study.spec.capture.sites) * len(study.layers)
    slot = study.spec.capture.batch_sequences * study.spec.corpus.sequence_length * study.model.hidden_size * 4
    return writer_count(os.cpu_count() or 1) + math.ceil((ring_slots(slot) - 1) / tensors) + 1


@pytest.mark.parametrize(
    ("parts", "strikes", "captures", "least_kills"),
    [
        ({"sequences": 20, "length": 1024, "capture": {"sites": SITES}}, BEGINNING + MIDDLE[::2], 1, 6),
        pytest.param(
            {"sequences": 20, "length": 1024, "capture": {"sites": SITES}},
            BEGINNING + MIDDLE,
            3,
            30,
            marks=pytest.mark.studies,
        ),
        pytest.param(
            {"sequences": 24, "length": 256, "capture": {"sites": SITES, "batch_sequences": 2, "codec": "zstd"}},
            MIDDLE,
            1,
            5,
            marks=pytest.mark.studies,
        ),
    ],
    ids=["plain", "plain-three-times", "zstd-batches-of-2"],
)
def test_killed_at_random_instants_it_ends_bit_for_bit_as_if_nothing_had_happened(
    tmp_path, deep, text, zygote, capsys, parts, strikes, captures, least_kills
):
    calm = open_workspace(tmp_path / "calm")
    study = prepared(calm, deep, text, **parts)
    extract(study, calm, Silent())
    chance, storms = random.Random(5), []

    def weather(strikes):
        number = len(storms)
        storm = Storm(study, open_workspace(tmp_path / f"stormy-{number}"), tmp_path / f"storm-{number}")
        storm.place.mkdir()
        shutil.copytree(calm.corpora, storm.workspace.corpora)
        storms.append(storm)
        storm.blow(zygote, chance, strikes)
        assert_identical(calm, storm.workspace, study)
        shutil.rmtree(storm.folder)

    for number in range(captures):
        weather(chance.sample(strikes, len(strikes)) if number else strikes)
    # a chunk is written in less than a millisecond: on a quick or busy machine few kills come in time, and there are more of them
    while sum(s.torn for s in storms) < least_kills // 6 and len(storms) < captures + MORE_CAPTURES:
        weather((in_mid_chunk,) * 8)
    kills, recomputed = sum(s.kills for s in storms), sum(s.recomputed for s in storms)
    flight, batch = batches_in_flight(study), study.spec.capture.batch_sequences
    with capsys.disabled():
        print(
            f"\n  {kills} kills of {len(storms)} captures of {study.corpus.num_sequences} sequences: {recomputed} recomputed, "
            f"{max(s.recomputed / max(s.kills, 1) for s in storms):.2f} a kill, at most {(flight + 1) * batch} allowed "
            f"({flight} batches of {batch} in flight, and one); {sum(s.torn for s in storms)} kills tore a chunk, "
            f"{sum(s.short for s in storms)} left one short"
        )
    assert kills >= least_kills
    assert sum(s.torn for s in storms) >= least_kills // 6, "hardly a kill came while a chunk was being written"
    for storm in storms:
        assert storm.recomputed <= storm.kills * (flight + 1) * batch
