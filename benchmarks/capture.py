"""What capturing costs: each stage of the pipeline side by side in one run, as ratios of medians.

    python -m benchmarks.capture                      SmolLM2, 8 sequences of 512 tokens, about five minutes
    python -m benchmarks.capture --sequences 2 --length 64 --rounds 1 --json figures.json

Variants, each over the same sequences with the model loaded once, one torch thread, in turn within each round:

    a  bare forward: the base model, no hooks
    b  hooks only: every site is seen and checked, nothing is copied
    c  + copy: into the ring, whose writers throw it away
    d  + Zarr: chunks, checksums, fsync and journal, uncompressed (the default)
    e  the same with byte-shuffled zstd-1
    f  the earlier pipeline's way: one whole forward, logits and all, for every 8 layers, and one tensor file for each
       site and layer, never synced

Writing alone is compared with one file of the same bytes, written in sequence and fsynced at its end, and with
zarr-python's own store. Peak memory is that of the pass, not of loading, in processes of their own.

Before each run the disk has everything that came before, and its pages are given back; files are removed at the very end:
a file system that has just removed hundreds of files is slow to make new ones (ext4 looks at each for a minute), and
memory that was never used is slower to write to than memory that was. So a run needs a few gigabytes of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.stages import Bench
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.study.ring_size import ring_bytes, ring_slots
from outliers.workspace import open_workspace

NAMES = {
    "a": "bare forward",
    "b": "hooks only",
    "c": "hooks + copy",
    "d": "hooks + copy + Zarr",
    "e": "the same, zstd-1",
    "f": "a forward per 8 layers, a file per tensor",
}
WRITES = {
    "raw": "one file, in sequence, one fsync",
    "ours": "chunks, checksums, fsyncs, journal: the writers alone",
    "ring": "the same through the ring, with the copy into it",
    "zstd": "the writers alone, zstd-1 (of uncompressed bytes)",
    "zarr": "zarr-python's own store, no fsync",
}
REPEATS = 3
"""Processes for each figure of memory; the median is reported."""


def open_bench(arguments: argparse.Namespace, scratch: Path) -> Bench:
    """The study of the command line, with its model in memory."""
    workspace = open_workspace(arguments.workspace)
    spec = {
        "model": {"id": arguments.model, "dtype": "bfloat16"},
        "corpus": {
            "source": "builtin:python-docs",
            "num_sequences": arguments.sequences,
            "sequence_length": arguments.length,
        },
        "capture": {"sites": arguments.sites.split(",")},
        "criteria": {"site": arguments.sites.split(",")[0]},
    }
    study = prepare(StudySpec.model_validate(spec), workspace)
    return Bench(study, load_corpus(study.corpus, workspace), load_model(study.model, workspace, "cpu"), scratch)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run; seconds are medians, ratios are medians of the rounds' own ratios."""
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.scratch))
    try:
        bench = open_bench(arguments, scratch)
        bench.run("a")  # warm: first touches of the weights
        tell(f"{len(bench.modules)} tensors a sequence, {bench.bytes / 1e6:.0f} MB a run")
        rounds = [_round(number, arguments.rounds, "abcdef", bench.run) for number in range(arguments.rounds)]
        tensors = bench.one_pass()
        writes = [
            _round(number, arguments.rounds, list(WRITES), lambda way: bench.write(way, tensors))
            for number in range(arguments.rounds)
        ]
    finally:
        shutil.rmtree(scratch)
    ratio = _ratios(rounds)
    figures = {
        "model": arguments.model,
        "sequences": arguments.sequences,
        "length": arguments.length,
        "sites": arguments.sites,
        "rounds": arguments.rounds,
        "bytes": bench.bytes,
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in NAMES},
        "ratios": {f"{x}/{y}": ratio(x, y) for x, y in (("b", "a"), ("c", "b"), ("d", "b"), ("e", "d"), ("f", "d"))},
        "write_seconds": {way: statistics.median(w[way] for w in writes) for way in WRITES},
        "write_rate_of_raw": {way: _ratios(writes)("raw", way) for way in WRITES if way != "raw"},
        "ring_bytes": ring_bytes(bench.slot_bytes, ring_slots(bench.slot_bytes)),
        "bound_bytes": {"d": bench.bound("none"), "e": bench.bound("zstd")},
    }
    if arguments.memory:
        figures["memory"] = memory(arguments)
    return figures


def _round(number: int, rounds: int, names: Any, run: Callable[[str], float]) -> dict[str, float]:
    seconds = {}
    # every other round backwards: what a machine does meanwhile falls on all
    for name in names if number % 2 == 0 else reversed(names):
        seconds[name] = run(name)
        tell(f"round {number + 1} of {rounds}: {name} {seconds[name]:.2f} s")
    return seconds


def _ratios(rounds: list[dict[str, float]]) -> Callable[[str, str], float]:
    return lambda x, y: statistics.median(r[x] / r[y] for r in rounds)


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak RSS in bytes of the pass, over few sequences and over eight times as many; medians of processes of their own."""
    found: dict[str, Any] = {}
    for sequences in (8, 64):
        for variant in ("a", "d", "e"):
            command = [sys.executable, "-m", "benchmarks.capture", "--peak", variant, "--sequences", str(sequences)]
            for name in ("model", "length", "sites", "workspace", "scratch", "threads"):
                if getattr(arguments, name) is not None:
                    command += [f"--{name}", str(getattr(arguments, name))]
            peaks = [
                int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                for _ in range(REPEATS)
            ]
            found.setdefault(variant, {})[str(sequences)] = statistics.median(peaks)
            tell(
                f"peak memory of {variant} over {sequences} sequences: {', '.join(f'{p / 1e6:.1f}' for p in peaks)} MB"
            )
    for variant in ("d", "e"):
        found[f"{variant} over a"] = {n: found[variant][n] - found["a"][n] for n in found["a"]}
    return found


def peak(arguments: argparse.Namespace) -> int:
    """Peak RSS in bytes of this process during one run of one variant, loaded and warm."""
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.scratch))
    try:
        bench = open_bench(arguments, scratch)
        everything = bench.ids
        bench.ids = everything[:1]
        for variant in ("a", arguments.peak):
            bench.run(variant)  # what libraries allocate once
        bench.ids = everything
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins here
        bench.run(arguments.peak)
        status = Path("/proc/self/status").read_text()
    finally:
        shutil.rmtree(scratch)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def tell(text: str) -> None:
    """A line of progress, away from the figures."""
    print(text, file=sys.stderr, flush=True)


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    seconds, ratios = figures["seconds"], figures["ratios"]
    lines: list[str] = [
        f"{figures['model']}, {figures['sequences']} x {figures['length']} tokens, {figures['sites']}: "
        f"{figures['bytes'] / 1e6:.0f} MB a run, medians of {figures['rounds']} rounds, one torch thread",
        "",
        "| | variant | seconds | to a |",
        "|---|---|---|---|",
        *(f"| {n} | {NAMES[n]} | {seconds[n]:.2f} | {seconds[n] / seconds['a']:.2f} |" for n in NAMES),
        "",
        ", ".join(f"{name} = {value:.3f}" for name, value in ratios.items()),
        "",
        "| writing alone | MB/s | of raw |",
        "|---|---|---|",
    ]
    for way, text in WRITES.items():
        share = figures["write_rate_of_raw"].get(way, 1.0)
        lines.append(f"| {text} | {figures['bytes'] / figures['write_seconds'][way] / 1e6:.0f} | {share:.2f} |")
    if "memory" in figures:
        found = figures["memory"]
        lines += ["", "| peak memory, MB | 8 sequences | 64 sequences |", "|---|---|---|"]
        for name in ("a", "d", "e", "d over a", "e over a"):
            lines.append(f"| {name} | {found[name]['8'] / 1e6:.1f} | {found[name]['64'] / 1e6:.1f} |")
        bounds = figures["bound_bytes"]
        lines += ["", *(f"bound that {n} prints: {bounds[n] / 1e6:.1f} MB beside the model" for n in ("d", "e"))]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sites", default="attn_in,mlp_in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the writers have the other cores")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--workspace", metavar="DIR", help="where the model and the corpus are kept")
    parser.add_argument("--scratch", metavar="DIR", help="where captures are written: on the disk to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--peak", choices=list(NAMES), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(arguments))
        return 0
    figures = measure(arguments)
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
