"""What counting in the forward pass costs, compared with capturing and then counting, on the same tokens.

    python -m benchmarks.in_pass                    SmolLM2, 8 sequences of 512 tokens, two minutes
    python -m benchmarks.in_pass --sequences 2 --length 64 --rounds 1 --json figures.json

Variants, with the model loaded once, in turn within each round, every other round backwards:

    bare      the base model, no hooks
    stored    what --store full does: a capture on the disk, uncompressed, then the counts of it, with a thread for each core
    pass      what --store none does on a processor: counted by threads while the model computes, nothing written

Seconds are of the clock; processor seconds are of all threads. The summaries of `stored` and `pass` must be equal bit for bit.
The benchmark runs on a processor. On a GPU it has not been run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.capture import open_bench
from benchmarks.stages import Bench
from outliers.capture.forward import Batch, HookedPass
from outliers.counting.analyze import WorkItem, frame_of, summarize
from outliers.counting.in_pass.counter import BatchMarks, PassShape
from outliers.counting.in_pass.host import HostCounter
from outliers.counting.summary import Summary
from outliers.store.fingerprint import shapes_of, write_fingerprint

VARIANTS = ("bare", "stored", "pass")


class Counting:
    """The variants over one bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.marks = bench, bench.corpus.marks()
        self.frame = frame_of(bench.study, bench.layout)

    def _marks_of(self, number: int) -> Any:
        return self.marks[number : number + 1]

    def bare(self) -> Summary | None:
        self.bench.bare(self.bench.scratch)
        return None

    def stored(self) -> Summary | None:
        """Capture, then count."""
        bench, folder = self.bench, Path(tempfile.mkdtemp(dir=self.bench.scratch))
        write_fingerprint(folder, {"fixed": {"format": 1}, "layout": shapes_of(bench.layout), "threads": 1})
        bench._capture(folder, "none")
        sequences = tuple(range(len(bench.ids)))
        item = WorkItem(folder, self.frame, sequences, bench.corpus.lengths, self.marks, folder / "summary")
        return summarize(item, os.cpu_count() or 1)

    def in_pass(self) -> Summary | None:
        """Count while the model computes."""
        bench, layout = self.bench, self.bench.layout
        shape = PassShape(1, layout.positions, layout.chunk_positions, layout.aliases)
        with HostCounter(self.frame, shape) as counter:
            # the counter takes the place of the buffer that hands tensors to the writers: it has `submit`
            hooked = HookedPass(bench.base, bench.modules, counter, layout, lambda done: None)  # type: ignore[arg-type]
            for number, row in enumerate(bench.ids):
                rows, lengths = range(number, number + 1), (layout.positions,)
                counter.begin(BatchMarks(rows, lengths, partial(self._marks_of, number)))
                # nothing is written: this batch has no journal and no files
                hooked.forward(Batch(rows, lengths, 0, None, None), row[None])  # type: ignore[arg-type]
                counter.end()
            found = counter.drain()
            hooked.detach()
        return found

    def run(self, variant: str) -> tuple[float, float, Summary | None]:
        """(seconds, processor seconds, summary) of one run."""
        do: Callable[[], Summary | None] = {"bare": self.bare, "stored": self.stored, "pass": self.in_pass}[variant]
        self.bench.calm()
        began, worked = time.perf_counter(), time.process_time()
        found = do()
        return time.perf_counter() - began, time.process_time() - worked, found


def check_equal(one: Summary, other: Summary) -> None:
    """Raise RuntimeError where two summaries differ in a bit."""
    for site, totals in one.sites.items():
        for name, value in totals.__dict__.items():
            if not np.array_equal(value, getattr(other.sites[site], name), equal_nan=value.dtype.kind == "f"):
                raise RuntimeError(f"{name} at {site} differs between a stored capture and the pass")
    for name in ("position_tokens", "first_tokens", "delimiter_tokens", "special_tokens", "top", "massive"):
        if not np.array_equal(getattr(one, name), getattr(other, name)):
            raise RuntimeError(f"{name} differs between a stored capture and the pass")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures: medians of the rounds, and the ratios of their medians."""
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.scratch))
    try:
        counting = Counting(open_bench(arguments, scratch))
        for variant in VARIANTS:
            counting.run(variant)  # compiles, and touches the weights
        rounds = []
        for number in range(arguments.rounds):
            seconds: dict[str, tuple[float, float]] = {}
            summaries = {}
            for name in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                taken, worked, summaries[name] = counting.run(name)
                seconds[name] = taken, worked
                print(f"round {number + 1}: {name} {taken:.2f} s, processor {worked:.2f} s", file=sys.stderr)
            if summaries["stored"] is not None and summaries["pass"] is not None:
                check_equal(summaries["stored"], summaries["pass"])
            rounds.append(seconds)
    finally:
        shutil.rmtree(scratch)
    wall, work = ({name: statistics.median(r[name][kind] for r in rounds) for name in VARIANTS} for kind in (0, 1))
    return {
        "model": arguments.model,
        "sequences": arguments.sequences,
        "length": arguments.length,
        "sites": arguments.sites,
        "rounds": arguments.rounds,
        "bytes": counting.bench.bytes,
        "threads": torch.get_num_threads(),
        "seconds": wall,
        "processor_seconds": work,
        "pass over stored": statistics.median(r["pass"][0] / r["stored"][0] for r in rounds),
        "pass over stored, processor": statistics.median(r["pass"][1] / r["stored"][1] for r in rounds),
        "pass over bare": statistics.median(r["pass"][0] / r["bare"][0] for r in rounds),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as the table of docs/performance.md."""
    lines = ["| variant | seconds | processor seconds | written, MB |", "|---|---:|---:|---:|"]
    for name in VARIANTS:
        written = figures["bytes"] / 1e6 if name == "stored" else 0
        lines.append(
            f"| {name} | {figures['seconds'][name]:.2f} | {figures['processor_seconds'][name]:.2f} | {written:.0f} |"
        )
    lines.append("")
    lines += [f"{name}: {figures[name]:.2f}" for name in figures if " over " in name]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="what counting in the forward pass costs, compared with a stored capture"
    )
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sites", default="attn_in,mlp_in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; those that count come to them")
    parser.add_argument("--workspace")
    parser.add_argument("--scratch")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = measure(arguments)
    print(table(figures))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
