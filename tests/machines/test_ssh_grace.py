"""A study that fails on a host: the host is held for the grace period, and the next run goes on there; then not any more."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.hub_server import Repo, commit_id, hub_server
from tests.support.remote import Sshd, needs_sshd
from tests.support.ssh_studies import SESSION, control, freeze, gone, ours, remote, sequences_done, settled, world

__all__ = ["control", "world"]  # fixtures, found by name

pytestmark = [pytest.mark.servers, needs_sshd]

SEQUENCES = 100


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("host"), "lab", environment=SESSION | {"HF_HUB_OFFLINE": "0"}) as machine:
        yield machine


def fail(control, host, words, machine):
    """The study, whose extraction is killed in the middle: what the journal has then."""
    command = control.start(*words)
    frozen = freeze(command, host, machine, at=5)
    command.until(lambda: re.search(r"extract [1-9][\d,]* of ", command.said), "the first sequences")
    (journal,) = remote(host, machine).glob("captures/*/journal.jsonl")
    kept = journal.read_bytes()
    for pid in frozen:
        os.kill(pid, signal.SIGKILL)
    assert command.wait() == 1, command.said
    assert "was killed (signal 9)" in command.said, command.said
    return kept


def listed(control):
    """`machines list`, by names."""
    found = json.loads(control.run("machines", "list", "--json").out.read_text())["machines"]
    return {one["name"]: one for one in found}


@pytest.mark.long
def test_the_next_run_goes_on_where_the_failed_one_stopped(tmp_path, world, host, control):
    words = world.study(SEQUENCES, *control.over("--grace", "900", machine="kept"))
    kept = fail(control, host, words, "kept")
    held = listed(control)["kept"]
    assert held["state"] == "up"
    assert 900 - 240 < held["lease_seconds_left"] <= 900
    (holder,) = json.loads((remote(host, "kept") / "lease.json").read_text())["holders"].values()
    assert 900 - 240 < holder["until"] - time.time() <= 900
    since = json.loads(control.record("kept").read_text())["since"]
    (capture,) = remote(host, "kept").glob("captures/*")
    disk = (capture / "capture.json").stat().st_ino

    command = control.run(*words)
    study = command.answer()["study_id"]
    assert f"extract: going on after {len(kept.splitlines())} of 100 sequences" in command.said, command.said
    assert control.manifest(study)["results_digest"] == world.digest(tmp_path / "here", SEQUENCES)
    # the same disk; what was journaled is there as it was, and each of the rest once
    assert (capture / "capture.json").stat().st_ino == disk
    journal = (capture / "journal.jsonl").read_bytes()
    assert journal.startswith(kept)
    assert len(set(journal.splitlines())) == len(journal.splitlines()) == SEQUENCES == sequences_done(host, "kept")
    assert control.records() == []
    (ended,) = map(json.loads, (control.workspace / "machines/history.jsonl").read_text().splitlines())
    assert (ended["name"], ended["since"], ended["how"]) == ("kept", since, "released")
    assert gone(host, "kept", 10), ours(host, "kept")


@pytest.mark.long
def test_after_the_grace_nothing_is_held(world, host, control):
    fail(control, host, world.study(SEQUENCES, *control.over("--grace", "6", machine="short")), "short")
    assert ours(host, "short"), "nobody would end it"
    assert control.records() == ["short"]
    assert gone(host, "short", 30), ours(host, "short")
    assert json.loads((remote(host, "short") / "lease.json").read_text())["holders"] == {}
    assert listed(control)["short"]["lease_seconds_left"] == 0
    assert control.run("machines", "reap").wait() == 0
    assert (control.records(), listed(control)) == ([], {})
    assert sequences_done(host, "short") >= 5, "files stay on a host of the user's own"


@pytest.mark.long
def test_weights_are_on_the_disk_that_was_asked_for_and_go_with_remove_files(tmp_path, world, host, control):
    """Those of the hub, and those that were sent: the folder is on another disk than the home folder there."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    files = {path.name: path.read_bytes() for path in Path(world.model).iterdir()}
    commit = commit_id("first")
    try:
        if folder.stat().st_dev == host.home.stat().st_dev:
            pytest.skip("needs another disk at /dev/shm")
        words = ("machines", "add", host.alias, host.alias, "--python", sys.executable, "--folder", str(folder))
        assert control.run(*words).wait() == 0
        with hub_server(Repo("models", "org/open", {commit: files}, {"main": commit})) as hub:
            there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
            asked = control.over("--remove-files", machine="away")
            command = control.start(*world.study(20, *asked, model="org/open"), **there)
            command.until(lambda: list(folder.glob("hub/models--org--open/snapshots/*/*.safetensors")), "the weights")
            command.answer()
        # but for a config: it is read to describe the model
        assert not list((host.home / ".cache").rglob("*.safetensors"))
        command = control.start(*world.study(20, *asked))
        command.until(lambda: list(folder.glob("uploads/*/*.safetensors")), "the weights")
        command.answer()
        assert settled(
            lambda: not [*folder.glob("hub/models--*"), *folder.glob("uploads/*"), *folder.glob("machines/*/jobs")]
        )
    finally:
        shutil.rmtree(folder)
