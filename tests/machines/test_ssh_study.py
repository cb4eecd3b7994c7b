"""Whole studies on a host over ssh, by the real command: the same numbers as here, kilobytes back, no secret left anywhere."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.support.hub_server import Repo, commit_id, hub_server
from tests.support.remote import Sshd, needs_sshd
from tests.support.ssh_studies import SESSION, attempts, control, freeze, gone, ours, remote, settled, thaw, world

__all__ = ["control", "world"]  # fixtures, found by name

pytestmark = [pytest.mark.servers, needs_sshd]

ALIAS = "zebra-lab-7"
SEQUENCES = 100
KEEP = ("--keep-running", "--keep-seconds", "7200")


class Watcher:
    """Looks at every process list, of this machine and so of the host's too, for a text; where it was seen."""

    def __init__(self, text: str) -> None:
        self.seen: list[str] = []
        self.looked = 0
        self._text = text.encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.looked += 1
            for entry in os.scandir("/proc"):
                if not entry.name.isdigit():
                    continue
                try:
                    line = Path(entry.path, "cmdline").read_bytes()
                except OSError:
                    continue
                if self._text in line:
                    self.seen.append(line.decode(errors="replace"))


def files_with(folder: Path, text: str) -> list[str]:
    """The files below a folder that have a text in them, or in their name."""
    paths = list(folder.rglob("*"))
    return [str(path) for path in paths if text in path.name or (path.is_file() and text.encode() in path.read_bytes())]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("host"), ALIAS, environment=SESSION | {"HF_HUB_OFFLINE": "0"}) as machine:
        yield machine


@pytest.mark.studies
def test_a_study_of_the_hub_leaves_its_token_nowhere(tmp_path, host, world, control):
    token = f"hf_{secrets.token_hex(20)}"
    files = {path.name: path.read_bytes() for path in Path(world.model).iterdir()}
    commit = commit_id("first")
    gated = Repo("models", "org/gated", {commit: files}, {"main": commit}, gated="manual", tokens=(token,))
    before = {run["id"] for run in world.prefect.flow_runs()}
    with hub_server(gated) as hub, Watcher(token) as watcher:
        hub_of_tests = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        words = world.study(SEQUENCES, *control.over("--publish-to", f"file://{tmp_path}/atlas"), model="org/gated")
        command = control.start(*words, HF_TOKEN=token, **hub_of_tests)
        command.answer()
        # the weights came to the host alone, which could not have had them without the token
        weights = [asked for asked in hub.requests("GET .*safetensors|GET /cdn/") if asked.sent]
        assert sum(asked.sent for asked in weights) >= len(files["model.safetensors"])
        assert not list((tmp_path / "hub").rglob("*.safetensors"))
    assert watcher.looked > 20
    assert watcher.seen == []
    (run,) = {run["id"] for run in world.prefect.flow_runs()} - before
    assert token not in world.prefect.logs(run)
    assert token not in json.dumps(world.prefect.artifacts(run))
    assert token not in command.out.read_text() + command.err.read_text()
    searched = (host.folder, control.folder, control.temporary, world.prefect.folder, tmp_path)
    assert [path for folder in searched for path in files_with(folder, token)] == []
    # the job had it: what is searched for would be found
    assert "HF_TOKEN" in (attempts(host, "extract")[0] / "job.json").read_text()
    assert control.records() == []
    assert gone(host, seconds=5), ours(host)


@pytest.mark.studies
def test_the_numbers_are_those_of_this_machine_and_only_kilobytes_come_back(tmp_path, host, world, control):
    here = world.digest(tmp_path / "here", SEQUENCES)
    atlas = tmp_path / "atlas"
    command = control.start(
        *world.study(
            SEQUENCES, *control.over("--publish-to", f"file://{atlas}", "--publish-log", machine="kept"), *KEEP
        )
    )
    outcome = command.answer()
    manifest = control.manifest(outcome["study_id"])
    assert manifest["results_digest"] == here

    capture = remote(host, "kept") / "captures" / outcome["capture_id"]
    captured = sum(path.stat().st_size for path in capture.rglob("*") if path.is_file())
    machine = manifest["provenance"]["machine"]
    assert 0 < machine["sent_bytes"] < 3_000_000
    assert 0 < machine["received_bytes"] < 1_000_000 < captured / 10
    assert not list(control.workspace.glob("captures/*/activations.zarr"))
    assert (host.home / ".outliers/deploy/code" / machine["wheel"] / ".ready").exists()
    assert (machine["provider"], machine["price_per_hour"]) == ("ssh", 0)

    published = [path for path in atlas.rglob("*") if path.is_file()]
    assert any(path.name == "run.log" for path in published)
    private = [
        ALIAS,
        str(host.home),
        str(control.workspace),
        str(tmp_path),
        f"@{host.address}",
        f":{host.port}",
        "/home/",
    ]
    for text in [*private, ".outliers/machines", f"{host.user}@"]:
        assert files_with(atlas, text) == []
    for path in published:  # words that may be short: looked for as words, where there is no code
        if path.suffix in (".json", ".log"):
            assert not re.search(rf"\b({re.escape(socket.gethostname())}|{host.user})\b", path.read_text()), path

    # kept as asked; another criterion there reads the capture that is there
    listed = json.loads(control.run("machines", "list", "--json").out.read_text())["machines"]
    assert [(one["name"], one["place"], one["state"]) for one in listed] == [("kept", ALIAS, "up")]
    assert 7_200 - 240 < listed[0]["lease_seconds_left"] <= 7_200
    assert "kept is kept for 120 minutes: outliers machines release kept" in command.said, command.said
    again = control.run(*world.study(SEQUENCES, *control.over("--magnitude", "5", machine="kept")))
    assert again.answer()["study_id"] != outcome["study_id"]
    assert again.answer()["capture_id"] == outcome["capture_id"]
    assert len(attempts(host, "extract", "kept")) == 1
    assert len((capture / "extractions.jsonl").read_text().splitlines()) == 1
    assert control.manifest(again.answer()["study_id"])["provenance"]["machine"]["sent_bytes"] < 1_000_000
    assert control.records() == ["kept"]

    assert control.run("machines", "release", "kept").wait() == 0
    assert control.records() == []
    assert gone(host, seconds=5), ours(host)
    assert json.loads((remote(host, "kept") / "lease.json").read_text())["holders"] == {}
    assert control.run("machines", "release", "kept").wait() == 0
    assert capture.exists(), "files stay on a host of the user's own"


@pytest.mark.long
def test_a_laptop_that_was_asleep_finds_its_lease_over_and_goes_on(tmp_path, host, world, control):
    """The watchdog has ended the job and removed its files: all is sent again, under a lease that is renewed."""
    here = world.digest(tmp_path / "here", SEQUENCES)
    command = control.start(*world.study(SEQUENCES, *control.over("--remove-files", machine="asleep")))
    frozen = freeze(command, host, "asleep")
    command.signal(signal.SIGSTOP)
    try:
        assert settled(lambda: not (remote(host, "asleep") / "studies").exists(), 60)
    finally:
        command.signal(signal.SIGCONT)
        thaw(frozen)
    study = command.answer()["study_id"]
    assert control.manifest(study)["results_digest"] == here
    assert command.said.count("one pass over") == 2
    assert control.records() == []
    assert gone(host, "asleep", 5), ours(host, "asleep")


@pytest.mark.studies
def test_a_model_of_this_side_is_not_sent_unasked(host, world, control):
    sent = host.log.stat().st_size
    words = [word for word in world.study(4, *control.over(machine="unasked")) if word != "--upload-model"]
    refused = control.run(*words)
    assert refused.wait() == 2
    megabytes = sum(path.stat().st_size for path in Path(world.model).iterdir()) / 1e6
    assert f"would need its {megabytes:,.0f} MB: --upload-model sends it" in refused.said, refused.said
    assert host.log.stat().st_size == sent, "the host was asked"
    assert not remote(host, "unasked").exists()
    assert control.records() == []


@pytest.mark.studies
def test_a_probe_goes_to_the_kept_machine_and_reads_nothing_again(tmp_path, host, world, control):
    atlas = tmp_path / "atlas"
    options = control.over("--perplexity", "--publish-to", f"file://{atlas}", machine="probed")
    outcome = control.start(*world.study(6, *options, *KEEP)).answer()
    assert outcome["verdict"] is None
    place = ["--workspace", str(control.workspace), "--json"]
    probed = control.run(
        "probe", outcome["study_id"], "--zero", "random=1", "--quantize", "int8_token", *place
    ).answer()
    assert probed["study_id"] == outcome["study_id"]
    assert f"{6 * 63} tokens of 6 sequences" in probed["verdict"] and "int8_token" in probed["verdict"]
    assert len(attempts(host, "extract", "probed")) == 1 and len(attempts(host, "analyze", "probed")) == 1
    # two files came home; the journal and the activations stay there
    there = list((remote(host, "probed") / "captures").glob("*/probes/*/journal.jsonl"))
    assert len(there) == 1 and not list(control.workspace.glob("captures/*/probes"))
    assert sorted(path.name for path in next(atlas.glob("*/*/probes/*")).iterdir()) == [
        "advice.json",
        "manifest.json",
        "probe.html",
        "probes.json",
        "sensitivity.parquet",
    ]
    advice = json.loads(control.run("advise", outcome["study_id"], "--budget", "1", *place).out.read_text())
    assert advice["budget"] == 1 and advice["formats"][0]["format"] == "int8_token"
    assert control.run("machines", "release", "probed").wait() == 0
