"""What --store rolling takes of the disk and the memory while a corpus grows, and how long it takes compared with the full store.

    python -m benchmarks.rolling                       ten million tokens, some minutes
    python -m benchmarks.rolling --tokens 1000000      shorter
    python -m benchmarks.rolling --full-tokens 0       without the full store
    python -m benchmarks.rolling --model sweeps/offline-models/smollm2-moe --tokens 51200 --full-tokens 5120 --length 256

A random model of two layers in float32, made by code, or the model of a folder, reads a text of random words. The window is a
fiftieth of the corpus. Each study runs in a process of its own, whose memory and disk are looked at all the while:

    disk     the largest size of the capture's folder with all that is in it, and of that what the chunks of activations take
    memory   resident memory of the process in all (pages of files that it reads among it), and what is its own
    at 1/4   the largest of these until a quarter of the corpus was counted; at 4/4 until the end
    results  bytes of tokens.json, of the page, and of all that is published

Flat is what is the same at 1/4 and at 4/4. Some bytes a sequence stay in any case: ids, and the counts of each sequence. The
full store reads the first --full-tokens of the same text, and so does a rolling one: their seconds and results are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outliers.files.atomic import held_bytes
from outliers.spec import StudySpec

WINDOWS = 50
LAYERS, SITES = 2, 2
SAMPLE_WORDS = 2_000
WORDS = 4_000
DOCUMENT_WORDS = 3_000
POLL_SECONDS = 0.1
GB, MB = 1e9, 1e6


@dataclass
class Peaks:
    """The largest that was seen, in bytes."""

    disk: int = 0
    chunks: int = 0
    resident: int = 0
    own: int = 0

    def see(self, other: Peaks) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, max(getattr(self, name), value))


@dataclass
class Watched:
    """A study that ran in a process of its own."""

    store: str
    tokens: int
    seconds: float = 0.0
    capture_bytes: int = 0
    results_digest: str = ""
    quarter: Peaks = field(default_factory=Peaks)
    whole: Peaks = field(default_factory=Peaks)
    results: dict[str, int] = field(default_factory=dict)
    """Bytes of each file of the results."""
    report: Peaks = field(default_factory=Peaks)
    """While the results were written and drawn: that does not depend on the store."""


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    """A Llama of random weights with a byte-level tokenizer: nothing is downloaded."""
    import torch
    import transformers

    from tests.support.tiny import save_tokenizer

    config = transformers.LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=260,
        max_position_embeddings=arguments.length,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def make_text(folder: Path, tokens: int, model: Path) -> None:
    """Documents of random words: as many as the model's tokenizer makes that many tokens of, and some more."""
    import transformers

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(WORDS)]
    sample = " ".join(words[:SAMPLE_WORDS])
    letters_of_token = len(sample) / len(
        transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)(sample)["input_ids"]
    )
    folder.mkdir()
    written, number = 0, 0
    while written < tokens * letters_of_token * 1.05 + 10_000:
        text = " ".join(words[n] for n in rng.integers(0, WORDS, DOCUMENT_WORDS)) + ".\n"
        (folder / f"{number:06d}.txt").write_text(text)
        written, number = written + len(text), number + 1


def spec_of(place: Path, arguments: argparse.Namespace, store: str, tokens: int) -> dict[str, Any]:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
    sequences = tokens // arguments.length
    features = SITES * config.num_hidden_layers * config.hidden_size
    dtype = (config.dtype or torch.float32) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    each = arguments.length * features * dtype.itemsize
    window = sequences * each / WINDOWS / GB
    rolling = {"store_sequences": arguments.batch, "disk_window": window} if store == "rolling" else {}
    return {
        "model": {"id": str(arguments.model), "dtype": str(dtype).removeprefix("torch.")},
        "corpus": {"source": str(place / "text"), "num_sequences": sequences, "sequence_length": arguments.length},
        "capture": {"store": store, "batch_sequences": arguments.batch, **rolling},
        "criteria": {"magnitude": arguments.magnitude},
        "compute": {"workspace": str(place / f"workspace-{store}-{tokens}"), "gpu_count": 0},
    }


class Telling:
    """A Reporter that prints progress as JSON lines: the process that watches reads them."""

    def log(self, level: str, message: str) -> None:
        print(json.dumps({"log": message}), file=sys.stderr)

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        print(json.dumps({"step": step, "done": done, "total": total}), flush=True)


def run_study(spec: dict[str, Any]) -> None:
    """One study in this process; the last line that it prints is the outcome."""
    from outliers.steps import run_analyze, run_extract, run_report
    from outliers.study.prepare import prepare
    from outliers.workspace import open_workspace

    made = StudySpec.model_validate(spec)
    workspace, reporter = open_workspace(made.compute.workspace), Telling()
    prepared = prepare(made, workspace)
    print(json.dumps({"prepared": str(workspace.capture(prepared.capture_id))}), flush=True)
    run_extract(prepared, workspace, reporter)
    run_analyze(prepared, workspace, reporter)
    digest = run_report(prepared, workspace, reporter)["results_digest"]
    results = {file.name: file.stat().st_size for file in (workspace.results / prepared.study_id).iterdir()}
    print(json.dumps({"results_digest": digest, "results": results}), flush=True)


def look(process: int, capture: Path, *, walk: bool) -> Peaks:
    """What a process and its capture take at this moment."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return Peaks()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    sizes = {name: int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}
    found = Peaks(resident=sizes["VmRSS"], own=sizes["RssAnon"])
    if walk and capture.exists():
        found.disk = held_bytes(capture)
        arrays = capture / "activations.zarr"
        found.chunks = sum(held_bytes(arrays / site) for site in ("attn_in", "mlp_in"))
    return found


def watch(place: Path, arguments: argparse.Namespace, store: str, tokens: int) -> Watched:
    """Run a study in a process of its own, and look at it until it ends."""
    spec = spec_of(place, arguments, store, tokens)
    found = Watched(store, tokens)
    command = [sys.executable, "-m", "benchmarks.rolling", "--study", json.dumps(spec)]
    state: dict[str, Any] = {"share": 0.0, "capture": Path("/nonexistent")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:

        def read() -> None:
            for line in process.stdout or ():
                told = json.loads(line)
                if told.get("step") == ("analyze" if store == "rolling" else "extract") and told["total"]:
                    state["share"] = told["done"] / told["total"]
                if "prepared" in told:
                    state.update(capture=Path(told["prepared"]), began=time.monotonic())
                state.update({name: value for name, value in told.items() if name.startswith("results")})

        reader = threading.Thread(target=read)
        reader.start()
        while process.poll() is None:
            if "began" in state:
                seen = look(process.pid, state["capture"], walk=store == "rolling")
                share = state["share"]
                (found.whole if share < 1 else found.report).see(seen)
                if share <= 0.25:
                    found.quarter.see(seen)
            time.sleep(POLL_SECONDS)
        reader.join()
    if process.returncode or "results_digest" not in state:
        raise SystemExit(
            f"the study with --store {store} failed: python -m benchmarks.rolling --study {json.dumps(spec)!r}"
        )
    found.seconds = time.monotonic() - state["began"]
    found.results_digest, found.results = str(state["results_digest"]), state["results"]
    found.capture_bytes = held_bytes(state["capture"])
    shutil.rmtree(spec["compute"]["workspace"])
    return found


def show(found: Watched) -> None:
    kb = {name: size / 1e3 for name, size in found.results.items()}
    print(
        f"{found.store:<8} {found.tokens:>12,} tokens  {found.seconds:7.1f} s  capture {found.capture_bytes / MB:8.1f} MB"
    )
    print(
        f"    results  tokens.json {kb['tokens.json']:.1f} KB, report.html {kb['report.html']:.1f} KB, "
        f"all {len(kb)} files {sum(kb.values()):.1f} KB",
        flush=True,
    )
    if found.store == "full":
        return
    for name, at in (("1/4", found.quarter), ("4/4", found.whole)):
        print(
            f"    at {name}  disk {at.disk / MB:8.1f} MB, of it chunks {at.chunks / MB:8.1f}   "
            f"memory {at.resident / MB:6.0f} MB, of it its own {at.own / MB:6.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens of the large corpus")
    parser.add_argument(
        "--full-tokens", type=int, default=1_000_000, help="tokens of the comparison with the full store"
    )
    parser.add_argument("--length", type=int, default=2_048, help="tokens in a sequence")
    parser.add_argument("--hidden", type=int, default=16, help="features of the random model")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a pass")
    parser.add_argument("--model", type=Path, help="folder of a model (default: a random one of two layers is made)")
    parser.add_argument("--dtype", default="auto", help="in which the model computes (default: as it is saved)")
    parser.add_argument("--magnitude", type=float, help="of an outlier feature (default: 1.5 for the random model, 6)")
    parser.add_argument("--scratch", type=Path, help="where the captures go (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--study", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.study:
        run_study(json.loads(arguments.study))
        return
    figures = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="rolling-") as name:
        place = Path(name)
        arguments.magnitude = arguments.magnitude or (6.0 if arguments.model else 1.5)
        if arguments.model is None:
            arguments.model = place / "model"
            make_model(arguments.model, arguments)
        make_text(place / "text", max(arguments.tokens, arguments.full_tokens), arguments.model)
        for store, tokens in (
            ("full", arguments.full_tokens),
            ("rolling", arguments.full_tokens),
            ("rolling", arguments.tokens),
        ):
            if tokens:
                figures.append(watch(place, arguments, store, tokens))
                show(figures[-1])
    if arguments.full_tokens:
        full, rolling = figures[:2]
        same = "the same" if full.results_digest == rolling.results_digest else "NOT the same"
        print(f"rolling took {rolling.seconds / full.seconds:.2f} of the full store's time; results_digest is {same}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in figures], indent=1))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
