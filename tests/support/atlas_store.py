"""Artifact stores with many studies, written by code: from `results_folder`'s study, with other models and numbers.

`study` is the content of a summary.json, `dozen` twelve that differ in all that an atlas tells apart. `publish_all` publishes
them as the program does; `quick_store` writes a thousand to a folder in seconds, each where a publisher puts it. In `evil`
every name is markup. `CountingProxy` sees what is asked of a server. The fixtures `store` and `own` are imported by name.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from outliers.files.parquet import parquet_bytes
from outliers.publish.allowlist import check_numbers
from outliers.publish.manifest import build_manifest, file_list, folder_of
from outliers.publish.publish import model_slug, publish_study
from outliers.publish.publishable import Publishable, write_publishable
from tests.support import results_folder

MODELS: list[tuple[str, float, float, int | None, int, int]] = [
    # id, total and active parameters in billions, experts, layers, hidden size
    ("Qwen/Qwen3-0.6B", 0.596, 0.596, None, 28, 1024),
    ("Qwen/Qwen3-1.7B", 1.72, 1.72, None, 28, 2048),
    ("Qwen/Qwen3-4B", 4.02, 4.02, None, 36, 2560),
    ("allenai/OLMoE-1B-7B-0125", 6.92, 1.28, 64, 16, 2048),
    ("Qwen/Qwen3-8B", 8.19, 8.19, None, 36, 4096),
    ("Qwen/Qwen3-14B", 14.8, 14.8, None, 40, 5120),
    ("openai/gpt-oss-20b", 20.9, 3.6, 32, 24, 2880),
    ("Qwen/Qwen3-30B-A3B", 30.5, 3.3, 128, 48, 2048),
    ("mistralai/Mixtral-8x7B-v0.1", 46.7, 12.9, 8, 32, 4096),
]
FINEWEB = "HuggingFaceFW/fineweb-edu"
EVIL = 'x"><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">'


def study(
    number: int,
    model: tuple[str, float | None, float | None, int | None, int, int],
    *,
    features: int = 3,
    layers: float = 0.5,
    reading: str = "pooled",
    site: str = "block",
    magnitude: float = 6.0,
    layer_fraction: float = 0.25,
    position_fraction: float = 0.06,
    corpus: tuple[str, int, int] = (FINEWEB, 16, 2048),
    dtype: str = "bfloat16",
    perplexity: float | None = None,
    massive: int | None = None,
    intervals: bool = True,
) -> dict[str, Any]:
    """summary.json of one study; its ids follow from `number`, its features from `features` and `layers`."""
    made = results_folder.summary(0, f"{number:016x}")
    name, total, active, experts, num_layers, hidden = model
    made["capture_id"] = hashlib.sha256(f"{name} {corpus} {dtype}".encode()).hexdigest()[:16]
    made["model"] |= {
        "id": name,
        "num_layers": num_layers,
        "hidden_size": hidden,
        "dtype": dtype,
        "num_experts": experts,
    }
    made["model"]["total_parameters"] = None if total is None else round(total * 1e9)
    made["model"]["active_parameters"] = None if active is None else round(active * 1e9)
    source, sequences, length = corpus
    made["corpus"] |= {"source": source, "num_sequences": sequences, "sequence_length": length}
    made["corpus"] |= {"num_tokens": sequences * length}
    made["criteria"] |= {"reading": reading, "site": site, "magnitude": magnitude}
    made["criteria"] |= {"layer_fraction": layer_fraction, "position_fraction": position_fraction}
    found = [_feature(n, layers, num_layers, sequences, reading, intervals=intervals) for n in range(features)]
    for own in made["readings"].values():
        own |= {how: found if how == reading else [] for how in ("pooled", "union", "per_layer", "affected")}
    pairs = sum(item["sequences"] for item in found)
    old = [item | {"position_fraction": item["position_fraction"] or 0.31, "interval": None} for item in found]
    made["readings"]["block"]["legacy"] = {"feature_sequence_pairs": pairs, "features": old}
    made["reading_counts"] = {
        at: {how: len(rows) for how, rows in own.items() if how != "legacy"} for at, own in made["readings"].items()
    }
    made["reading_counts"]["block"]["legacy"] = features
    made["systematic"] = found
    made["without_first_tokens"] = {}
    counts = {site: {reading: [max(features - 1, 0), features + 1]}}
    made["intervals"] = {"level": 0.95, "resamples": 1000, "seed": 0, "counts": counts} if intervals else None
    row = made["layers"][0]
    made["layers"] = [{**row, "site": at, "layer": n} for at in ("attn_in", "mlp_in") for n in range(num_layers)]
    steps = sorted({3.0, 6.0, 12.0, magnitude})
    line = [features + 4 * (len(steps) - n) - (len(steps) - steps.index(magnitude)) * 4 for n in range(len(steps))]
    line = [max(count, 0) for count in line]
    made["criteria"]["ladder"] = steps
    both = {at: dict.fromkeys(("pooled", "union", "per_layer", "affected"), line) for at in made["readings"]}
    made["sweep"] = {"magnitudes": steps, "counts": both}
    if massive is not None:
        made["massive"], made["massive_count"] = [], massive
    if perplexity is not None:
        made["perplexity"] = {"value": perplexity, "loss": 2.5, "tokens": sequences * (length - 1)}
    return made


def _feature(
    n: int, layers: float, num_layers: int, sequences: int, reading: str, *, intervals: bool
) -> dict[str, Any]:
    share = min(layers + 0.03 * (n % 3), 1.0)
    tokens = None if reading == "per_layer" else round(0.1 + 0.07 * (n % 9), 4)
    made = results_folder.feature(7 + 3 * n, 40.0 - n * 0.01)
    made |= {"layer_fraction": share, "layers": list(range(max(round(share * num_layers), 1)))}
    made |= {"position_fraction": tokens, "sequences": sequences - n % 2, "of_sequences": sequences}
    ends = None if tokens is None else [round(tokens * 0.8, 4), round(tokens * 1.1, 4)]
    interval = {"layer_fraction": [max(share - 0.08, 0.0), min(share + 0.04, 1.0)], "position_fraction": ends}
    return made | {"interval": interval | {"passes": 0.97} if intervals else None}


def dozen() -> list[dict[str, Any]]:
    """Twelve studies: dense and MoE, two corpora, dtypes, readings, magnitudes and sites, with and without everything."""
    by = {name.rpartition("/")[2]: model for model in MODELS for name in model[:1]}
    tiny = ("builtin:smollm2", 0.1345, 0.1345, None, 30, 576)
    unknown = ("local:0123456789ab", None, None, None, 12, 768)
    python = ("builtin:python-docs", 8, 512)
    return [
        study(1, by["Qwen3-0.6B"], features=2, layers=0.32, perplexity=19.1),
        study(2, by["Qwen3-4B"], features=4, layers=0.55, perplexity=13.0, massive=812),
        study(3, by["Qwen3-14B"], features=6, layers=0.86, perplexity=9.7),
        study(4, by["OLMoE-1B-7B-0125"], features=1, layers=0.27, perplexity=11.9),
        study(5, by["Qwen3-30B-A3B"], features=3, layers=0.38, perplexity=9.9, massive=0),
        study(6, by["Qwen3-30B-A3B"], features=5, layers=0.4, corpus=python, dtype="float16"),
        study(7, by["Mixtral-8x7B-v0.1"], features=0),
        study(8, tiny, features=2, layers=0.3, corpus=(python[0], 1, 512), intervals=False),
        study(9, unknown, features=1, layers=0.9, dtype="float32"),
        study(10, by["Qwen3-4B"], features=7, layers=0.6, reading="union"),
        study(11, by["Qwen3-4B"], features=60, layers=0.3, magnitude=3.0),
        study(12, by["gpt-oss-20b"], features=2, layers=0.5, reading="per_layer", site="attn_in"),
    ]


def bare(summary: dict[str, Any], spec: dict[str, Any] | None = None) -> Publishable:
    """A study without page and pictures, which take seconds."""
    tokens, features = results_folder.tokens(summary["study_id"]), results_folder.features()
    contents = {"summary.json": summary, "tokens.json": tokens}
    files = {name: json.dumps(content).encode() for name, content in contents.items()}
    numbers = check_numbers(files | {"features.parquet": parquet_bytes(features)})
    return Publishable(build_manifest(numbers.files, spec=spec or {}, provenance={}), numbers.files)


def finished(folder: Path, summary: dict[str, Any]) -> Path:
    """A finished results folder of a summary, with one plot."""
    files = dict(bare(summary).files) | {"plots/plot_000.png": b"a picture"}
    write_publishable(folder, Publishable(build_manifest(files, spec={}, provenance={}), files))
    return folder


def publish_all(target: str, summaries: list[dict[str, Any]]) -> list[str]:
    """Publishes studies as the program does; returns the URLs of their manifests."""
    return [publish_study(bare(summary), target, model_slug(summary["model"]["id"])) for summary in summaries]


def many(count: int) -> list[dict[str, Any]]:
    """`count` studies of a hundred models, under four sets of criteria."""
    chance = random.Random(7)
    found = []
    for number in range(count):
        billions = round(10 ** chance.uniform(-1, 2.2), 3)
        experts = chance.choice([None, 8, 64, 128])
        name = f"lab{number % 7}/model-{number % 100:03}"
        active = billions if experts is None else billions / 6
        model = (name, billions, active, experts, chance.choice([16, 28, 48]), chance.choice([1024, 2048, 4096]))
        settings = {"reading": chance.choice(["pooled", "union"]), "magnitude": chance.choice([6.0, 3.0])}
        perplexity = round(60 / (1 + billions) ** 0.4, 2)
        shares = {"features": chance.randrange(12), "layers": chance.uniform(0.25, 0.9)}
        found.append(study(number, model, perplexity=perplexity, **settings, **shares))
    return found


def objects(summary: dict[str, Any], others: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """`<slug>/<study_id>` and what a publisher puts there, by path; `others` are the files beside summary.json."""
    contents = {"summary.json": json.dumps(summary).encode(), **others}
    listed = file_list(contents)
    manifest = {
        "schema_version": 1,
        "study_id": summary["study_id"],
        "capture_id": summary["capture_id"],
        "results_digest": hashlib.sha256(contents["summary.json"]).hexdigest(),
        "folder": folder_of(listed),
        "files": listed,
        "headline": {
            "model": summary["model"]["id"],
            "num_systematic": len(summary["systematic"]),
            "systematic": [row["feature"] for row in summary["systematic"][:20]],
            "reading": summary["criteria"]["reading"],
            "site": summary["criteria"]["site"],
            "num_tokens": summary["corpus"]["num_tokens"],
            "num_layers": summary["model"]["num_layers"],
            "hidden_size": summary["model"]["hidden_size"],
        },
        "spec": {},
        "provenance": {},
    }
    put = {f"{manifest['folder']}/{path}": data for path, data in contents.items()}
    put["manifest.json"] = json.dumps(manifest, sort_keys=True, indent=1).encode()
    return f"{model_slug(summary['model']['id'])}/{summary['study_id']}", put


def quick_store(root: Path, summaries: list[dict[str, Any]], *, size_bytes: int = 0) -> None:
    """A store at the folder `root`, without waiting for the disk; each summary.json has at least `size_bytes`."""
    others = {"report.html": b"<!doctype html>", "tokens.json": b"{}", "features.parquet": b"PAR1"}
    for summary in summaries:
        lacking = size_bytes - len(json.dumps(summary))
        row = summary["readings"]["mlp_in"]["pooled"][:1] or [results_folder.feature(1, 9.0)]
        if lacking > 0:  # as in a real one, most of it is lists of features
            summary["readings"]["mlp_in"]["union"] = row * (lacking // len(json.dumps(row)) + 1)
        place, put = objects(summary, others)
        for path, data in put.items():
            target = root / place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def evil(place: Path) -> str:
    """A store whose every name is markup; its URL."""
    summary = study(1, (EVIL, 1.0, 1.0, None, 16, 1024), corpus=(EVIL, 2, 64))
    summary["model"] |= {"architecture": EVIL, "revision": EVIL, "dtype": EVIL, "quantization": EVIL}
    publish_study(bare(summary, {"label": EVIL}), f"file://{place}/store", model_slug(EVIL))
    publish_all(f"file://{place}/store", [study(2, MODELS[0])])
    (place / "store" / EVIL.replace("/", "-")).write_text("")
    return f"file://{place}/store"


class CountingProxy:
    """A server on loopback that passes every byte on to another one, and keeps the request lines that it saw."""

    def __init__(self, port: int) -> None:
        self.requests: list[tuple[str, str]] = []
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            for source, sink, heard in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(source, sink, heard), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, heard: bool) -> None:
        try:
            while data := source.recv(65_536):
                if heard:  # requests without a body: each begins a segment of its own
                    found = re.match(rb"([A-Z]+) (\S+) HTTP/1\.1\r\n", data)
                    if found:
                        self.requests.append((found[1].decode(), found[2].decode()))
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a folder with a dozen studies, published as the program does it."""
    place = tmp_path_factory.mktemp("atlas")
    publish_all(f"file://{place}/store", dozen())
    return f"file://{place}/store"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A store that a test may damage: two studies of one model."""
    root = tmp_path / "store"
    quick_store(root, [study(1, MODELS[0]), study(2, MODELS[0], reading="union")])
    return root


def place_of(root: Path, number: int) -> Path:
    """The folder of a study."""
    (found,) = root.glob(f"*/{number:016x}")
    return found


def edited(root: Path, number: int, **fields: Any) -> None:
    """The study with other fields in its manifest."""
    path = place_of(root, number) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
