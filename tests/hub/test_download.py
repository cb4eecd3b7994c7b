"""Models of the hub, downloaded by the real client from a server on loopback: resumed, pinned, refused, counted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from outliers.errors import DiskFull
from outliers.hub import download
from outliers.hub.cache import CachedModel
from outliers.hub.client import HubFile
from tests.support import tiny
from tests.support.cases import first_here
from tests.support.commands import run_program
from tests.support.hub_server import Fault, Repo, client_environment, commit_id, hub_server, sha256, wait_until

BEGINS_ANEW = int(metadata.version("huggingface_hub").split(".")[0]) >= 2
"""Version 2 begins a file anew that another process has begun; version 1 goes on in it."""

pytestmark = pytest.mark.servers

OLD, NEW = commit_id("old"), commit_id("new")
SECRET = "hf_theSecretOfThisTest"
MB = 1_000_000


def noise(seed, size):
    """Bytes of which no part is like another."""
    return hashlib.shake_256(seed.encode()).digest(size)


def model(word, size=26 * MB):
    shards = {f"model-0000{n}-of-00002.safetensors": noise(f"{word}{n}", size) for n in (1, 2)}
    index = {"weight_map": {f"layer.{n}": name for n, name in enumerate(shards)}}
    small = {"config.json": word.encode(), "tokenizer.json": b"[]", "generation_config.json": b"{}"}
    copies = {
        "consolidated.safetensors": noise("copy", MB),
        "original/model.safetensors": noise("original", MB),
        "pytorch_model.bin": b"pickled",
        "modeling.py": b"print('the script ran')",
        "README.md": b"# a model",
    }
    return small | {"model.safetensors.index.json": json.dumps(index).encode()} | shards | copies


@pytest.fixture(scope="module")
def files():
    return model("old")


NEEDED = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


@pytest.fixture(scope="module")
def hub(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_model(folder)
    real = {path.name: path.read_bytes() for path in folder.iterdir()}
    repos = [
        Repo("models", "org/model", {OLD: files, NEW: model("new", 2 * MB)}, {"main": OLD}),
        Repo("models", "org/gated", {OLD: model("gated", 2 * MB)}, {"main": OLD}, gated="manual", tokens=(SECRET,)),
        Repo("models", "org/pickled", {OLD: {"config.json": b"{}", "pytorch_model.bin": b"x"}}, {"main": OLD}),
        Repo("models", "org/odd", {OLD: {"config.json": b"{}", "odd.safetensors": b"x"}}, {"main": OLD}),
        Repo("models", "org/tiny", {OLD: real}, {"main": OLD}),
    ]
    with hub_server(*repos) as running:
        yield running


@pytest.fixture(autouse=True)
def clean(hub):
    yield
    hub.forget()
    hub.find("models", "org/model").branches["main"] = OLD


SCRIPT = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING)
for name in ("prefect", "datasets", "rich", "s3fs"):
    sys.modules[name] = None  # a machine has the base dependencies alone
from outliers.hub.download import download_model
from outliers.errors import OutliersError
from outliers.hub.client import tries_in_a_row
name, commit, tries = json.loads(sys.argv[1])
steps = []
try:
    with tries_in_a_row(tries):
        folder = download_model(name, commit, progress=lambda done, total: steps.append((done, total)))
    print(json.dumps({"folder": str(folder), "steps": steps}))
except OutliersError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
except OSError as error:
    print(json.dumps({"error": "OSError", "errno": error.errno}))
"""


def command(name="org/model", commit=OLD, tries=8):
    return [sys.executable, "-c", SCRIPT, json.dumps([name, commit, tries])]


def fetch(hub, home, name="org/model", commit=OLD, tries=8, **environment):
    """What a process of its own fetches: its answer and its log."""
    known = client_environment(hub.url, home, **environment)
    done = run_program(SCRIPT, json.dumps([name, commit, tries]), environment=known)
    assert SECRET not in done.stdout + done.stderr
    assert "Signature=secret" not in done.stdout
    return json.loads(done.stdout), done.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cache(home, name="org/model", commit=OLD):
    return home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit


def test_what_is_needed_comes_once_and_is_counted(hub, tmp_path, files):
    found, _ = fetch(hub, tmp_path)
    assert found["folder"] == str(cache(tmp_path))
    assert contents(cache(tmp_path)) == {name: files[name] for name in NEEDED}
    total = sum(len(files[name]) for name in NEEDED)
    assert hub.sent("GET (/cdn|/org)") == total
    steps = found["steps"]
    assert steps[-1] == [total, total]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    hub.forget()
    again, _ = fetch(hub, tmp_path)
    assert again == {"folder": found["folder"], "steps": [[total, total]]}
    offline, _ = fetch(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline == again
    assert hub.requests() == []


def test_a_real_model_loads_from_the_folder(hub, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    found, _ = fetch(hub, tmp_path, "org/tiny")
    loaded = AutoModelForCausalLM.from_pretrained(found["folder"], use_safetensors=True)
    assert loaded(torch.arange(8)[None]).logits.isfinite().all()


WHERE = [
    # where the folder of ours is, what was set or is there besides, and where the weights go
    ("here", {}, "own"),
    ("/dev/shm", {}, "ours"),
    ("/dev/shm", {"HF_HOME": "chosen"}, "chosen/hub"),
    ("/dev/shm", {"HF_HUB_CACHE": "chosen"}, "chosen"),
    ("/dev/shm", {"model": "whole"}, "own"),
    ("/dev/shm", {"model": "part"}, "ours"),
]


@pytest.mark.parametrize(("disk", "given", "expected"), first_here(WHERE, 2))
def test_weights_go_to_our_folder_where_the_cache_is_on_another_disk(hub, tmp_path, disk, given, expected):
    """A job on another machine: the disk that was asked for is the folder's, and what is cached there is not fetched again."""
    place = Path(tempfile.mkdtemp(dir=tmp_path if disk == "here" else disk))
    try:
        if place.stat().st_dev == tmp_path.stat().st_dev and disk != "here":
            pytest.skip(f"needs another disk than that of {tmp_path} at {disk}")
        places = {"own": tmp_path / "cache/huggingface/hub", "ours": place / "hub"}
        there = places.get(expected, tmp_path / expected)
        environment = {name: str(tmp_path / word) for name, word in given.items() if name.startswith("HF_")}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OUTLIERS_HUB_FOLDER": str(places["ours"])}
        if "model" in given:
            own, _ = fetch(hub, tmp_path / "cache/huggingface", "org/tiny")
            if given["model"] == "part":
                (Path(own["folder"]) / "model.safetensors").unlink()
        hub.forget()
        known = {k: v for k, v in client_environment(hub.url, tmp_path).items() if k != "HF_HOME"} | environment
        done = run_program(SCRIPT, json.dumps(["org/tiny", OLD, 8]), environment=known)
        found = json.loads(done.stdout)
        assert found.get("folder") == str(there / "models--org--tiny" / "snapshots" / OLD), found
        assert "model.safetensors" in contents(Path(found["folder"]))
        assert bool(hub.sent("GET (/cdn|/org)")) == (given.get("model") != "whole")
        assert places["ours"].exists() == (expected == "ours")
    finally:
        shutil.rmtree(place)


def test_a_killed_download_goes_on_from_what_it_wrote(hub, tmp_path, files):
    # both shards stop in the middle, and the process is killed while it waits for more
    hub.faults.append(Fault("GET /cdn/", stall_after=22 * MB, times=2))
    process = subprocess.Popen(command(), env=client_environment(hub.url, tmp_path), stdout=subprocess.DEVNULL)
    try:
        partial = cache(tmp_path).parent.parent / "blobs"
        # huggingface_hub writes pieces of 10 MiB
        wait_until(lambda: sum(p.stat().st_size for p in partial.glob("*.incomplete")) == 4 * 10 * 1024 * 1024)
        assert len(list(partial.glob("*.incomplete"))) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: len(hub.requests("GET /cdn/")) == 2)
    hub.forget()
    found, _ = fetch(hub, tmp_path)
    assert contents(cache(tmp_path)) == {name: files[name] for name in NEEDED}
    weights = sum(len(files[name]) for name in NEEDED if name.endswith(".safetensors"))
    if BEGINS_ANEW:
        assert hub.sent("GET /cdn/") == weights
        return
    assert hub.sent("GET /cdn/") == weights - 4 * 10 * 1024 * 1024
    assert {asked.range for asked in hub.requests("GET /cdn/")} == {f"bytes={2 * 10 * 1024 * 1024}-"}
    assert all(done >= 4 * 10 * 1024 * 1024 for done, _ in found["steps"])


FAULTS = {
    # name: (faults, what the log says)
    "told to wait": (
        [
            Fault("GET /api/models/org/model", status=429, headers={"RateLimit": '"api";r=0;t=1'}),
            Fault("HEAD .*config.json", status=429, headers={"Retry-After": "1"}),
            Fault("GET /cdn/", status=503, headers={"Retry-After": "1"}),
        ],
        ("the hub asks to wait 1 s (429)", "the hub asks to wait 1 s (503)"),
    ),
    "cut in the middle, twice": (
        [Fault("GET /cdn/", cut_after=12 * MB, times=2), Fault("GET .*tokenizer.json", cut_after=1)],
        ("peer closed connection",),
    ),
    "an address that is over": ([Fault("GET /cdn/", status=403)], ("the hub did not answer (403)",)),
}


@pytest.mark.parametrize("name", first_here(FAULTS))
def test_the_files_are_the_same_whatever_goes_wrong(hub, tmp_path, files, name):
    faults, says = FAULTS[name]
    hub.faults.extend(replace(fault) for fault in faults)
    _, log = fetch(hub, tmp_path)
    assert contents(cache(tmp_path)) == {name: files[name] for name in NEEDED}
    assert not any(fault.times for fault in hub.faults), "a fault was never met"
    assert all(words in log for words in says), log


def test_parts_of_other_bytes_are_noticed_and_fetched_anew(hub, tmp_path, files):
    """A part whose bytes a crash of the machine lost: of the right length, and not the hub's."""
    first, second = (files[name] for name in NEEDED if name.endswith(".safetensors"))
    blobs = cache(tmp_path).parent.parent / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(first)}.incomplete").write_bytes(bytes(5 * MB))
    (blobs / f"{sha256(second)}.incomplete").write_bytes(second + b"too much")
    _, log = fetch(hub, tmp_path)
    assert contents(cache(tmp_path)) == {name: files[name] for name in NEEDED}
    assert BEGINS_ANEW or "other bytes than the hub's after going on from a part" in log


def test_a_commit_is_fetched_though_its_branch_moved(hub, tmp_path, files):
    hub.find("models", "org/model").branches["main"] = NEW
    fetch(hub, tmp_path)
    assert contents(cache(tmp_path)) == {name: files[name] for name in NEEDED}
    fetch(hub, tmp_path, commit=NEW)
    # another commit beside it, and the first is still there
    assert (cache(tmp_path, commit=NEW) / "config.json").read_bytes() == b"new"
    assert contents(cache(tmp_path)) == {name: files[name] for name in NEEDED}


@pytest.mark.parametrize(
    ("name", "commit", "token", "message"),
    [
        ("org/gated", OLD, None, "org/gated is gated: accept its terms on the hub and set HF_TOKEN"),
        ("org/gated", OLD, "hf_ofAnother", "org/gated is gated: accept its terms on the hub and set HF_TOKEN"),
        ("org/missing", OLD, None, "no model of the hub that this account may see"),
        ("org/model", "f" * 40, None, f"org/model has no revision '{'f' * 40}'"),
        ("org/model", OLD, "wrong", "refuses the token"),
        ("org/pickled", OLD, None, "has no safetensors weights"),
        ("org/odd", OLD, None, "has no safetensors weights"),
    ],
)
def test_what_can_not_be_had_is_an_unknown_model(hub, tmp_path, name, commit, token, message):
    found, log = fetch(hub, tmp_path, name, commit, **({"HF_TOKEN": token} if token else {}))
    assert found["error"] == "UnknownModel"
    assert message in found["message"]
    assert "trying again" not in log


def test_who_accepted_the_terms_gets_the_files(hub, tmp_path):
    fetch(hub, tmp_path, "org/gated", HF_TOKEN=SECRET)
    assert sorted(contents(cache(tmp_path, "org/gated"))) == NEEDED


def test_offline_what_is_missing_is_named(hub, tmp_path):
    fetch(hub, tmp_path, commit=NEW)
    (cache(tmp_path, commit=NEW) / NEEDED[3]).unlink()
    hub.forget()
    found, _ = fetch(hub, tmp_path, commit=NEW, HF_HUB_OFFLINE="1")
    assert found["error"] == "UnknownModel"
    assert f"{NEEDED[3]} of org/model" in found["message"]
    assert "HF_HUB_OFFLINE" in found["message"]
    assert hub.requests() == []
    fetch(hub, tmp_path, commit=NEW)
    assert hub.sent("GET /cdn/") == 0, "its bytes were still there under another name"
    assert sorted(contents(cache(tmp_path, commit=NEW))) == NEEDED


def test_a_file_that_is_moved_while_it_is_looked_for_is_found_where_it_went(tmp_path):
    """Four threads fetch while the caller's counts: bytes go from `.incomplete` to the blob, and then get their name."""
    place = CachedModel("org/moving", OLD, tmp_path / "models--org--moving")
    file = HubFile("model.safetensors", 100, "aa")
    named, blob, growing = place.paths(file)
    named.parent.mkdir(parents=True)
    blob.parent.mkdir()
    order = [growing, blob, named]

    class Moved(type(growing)):
        """A path whose file goes on to the next place whenever it is found, and before anybody can look a second time."""

        def stat(self, **given):
            found = super().stat(**given)
            later = order[order.index(self) + 1 :]
            if later:
                Path(self).rename(later[0])
            return found

        exists = Path.exists

    growing.write_bytes(b"x" * 100)
    paths = tuple(map(Moved, (named, blob, growing)))

    class Moving(CachedModel):
        def paths(self, file):
            return paths

    watched = Moving(place.repo_id, place.commit, place.folder)
    assert [watched.have(file) for _ in range(3)] == [100, 100, 100]
    assert named.exists()


def test_a_storm_ends_as_unavailable(hub, tmp_path):
    hub.faults.append(Fault("GET /cdn/", status=500, times=1000))
    found, _ = fetch(hub, tmp_path, tries=3)
    assert found["error"] == "HubUnavailable"
    assert re.search(r"in 3 tries over \d+ s, the last time with 500, for model-0000", found["message"])
    # the small files stay for the next time
    assert (cache(tmp_path) / "config.json").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_comes(tmp_path):
    place = CachedModel("org/large", OLD, tmp_path / "models--org--large")
    with pytest.raises(DiskFull, match=r"needs 1,000,000,000,000,000,000 bytes more, .* has [\d,]+ free"):
        download.check_disk(place, (HubFile("model.safetensors", 10**18),))
    blob = tmp_path / "models--org--large" / "blobs" / "aa.incomplete"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * 100)
    download.check_disk(place, (HubFile("model.safetensors", 100, "aa"),))


def test_a_disk_that_is_full_says_so(hub, tmp_path):
    """The limit of a file's size stands in for the disk: the same OSError from the same write."""
    limited = ["bash", "-c", 'ulimit -f 8192; trap "" XFSZ; exec "$@"', "limited", *command()]
    done = subprocess.run(
        limited, env=client_environment(hub.url, tmp_path), capture_output=True, text=True, check=True
    )
    began = time.monotonic()
    assert json.loads(done.stdout) == {"error": "OSError", "errno": 27}, done.stderr
    assert time.monotonic() - began < 60
