"""What watching the experts costs: a Qwen3-like mixture of 64 experts, with and without, side by side in one run.

    python -m benchmarks.experts                      about a minute
    python -m benchmarks.experts --rounds 9 --tokens 1024 --json figures.json

Variants, over the same tokens with one model in memory, in turn within each round, every other round backwards:

    bare     the forward pass, no hooks
    watched  hooks and modes; what they give is thrown away
    added    and the routing table and all sums, as a capture makes them

The weights are random, so the routing is even and means nothing; shapes, tokens for each expert and the number of values are
those of a real layer. Told are medians of seconds, and of each round's ratio to its own bare pass, with the least and the
greatest; the share of the compiled loops is what is left between the two. The ratios are of the clock, and of the seconds that
the process itself computes, which other programs of the machine disturb less; `least` compares the least of all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from outliers.experts.add import add_layer
from outliers.experts.record import Give
from outliers.experts.routed import Routed, Routing
from outliers.experts.stream import ExpertStream
from outliers.experts.sums import ExpertSums
from outliers.experts.table import FIELDS, ExpertShapes
from outliers.experts.watch import ExpertWatch
from outliers.model.experts import ExpertsInfo, find_experts
from outliers.model.sites import study_anatomy

VARIANTS = ("bare", "watched", "added")
TARGETS = {"grouped_mm": 1.05, "eager": 1.10}
"""Seconds of `added` over `bare` that are wanted at most."""
CLOCKS = ("clock", "processors")
SEQUENCES = 4


def make_model(arguments: argparse.Namespace, implementation: str) -> Any:
    """A mixture with Qwen3-30B-A3B's proportions: experts of 3/8 of the hidden size, 8 of them for a token."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.hidden * 3 // 8,
        intermediate_size=arguments.hidden * 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(1, arguments.hidden // 512),
        head_dim=128,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, experts_implementation=implementation, trust_remote_code=False
    ).eval()


def _nothing(*_: torch.Tensor) -> None:
    """Takes an expert and does nothing."""


class Bench:
    """One model, its tokens, and the sums that are added to."""

    def __init__(self, arguments: argparse.Namespace, implementation: str) -> None:
        self.model = make_model(arguments, implementation)
        anatomy = study_anatomy(self.model, self.model.config)
        info = find_experts(self.model.model, anatomy, self.model.config, implementation, None)
        if info is None:
            raise SystemExit("the model has no experts that are known")
        self.info: ExpertsInfo = info
        self.positions = arguments.tokens // SEQUENCES
        self.ids = torch.randint(0, 1024, (SEQUENCES, self.positions))
        self.lengths = (self.positions,) * SEQUENCES
        self.stream: ExpertStream | None = None
        shapes = ExpertShapes(info.layers, info.count, info.slots, info.width, info.shared_widths, arguments.hidden)
        self.sums = ExpertSums.zero(shapes)
        self.table = {
            field: np.full((len(info.layers), SEQUENCES, self.positions, shapes.slots_of(field)), empty, dtype)
            for field, (dtype, empty) in FIELDS.items()
        }

    def add(self, routed: Routed) -> None:
        """As a capture does it, in the forward pass."""
        index, stream, self.stream = self.info.layers.index(routed.layer), self.stream, None
        add_layer(self.sums, self.table, index, routed, self.lengths, self.positions, None, stream)

    def begin(self, routing: Routing) -> Give:
        """As a capture does it, before the first expert of a layer that computes one after the other."""
        index = self.info.layers.index(routing.layer)
        self.stream = ExpertStream(self.sums, index, routing, self.lengths, self.positions)
        return self.stream.add

    def run(self, variant: str) -> tuple[float, float]:
        """Seconds of one pass: of the clock, and of the processors in this process."""
        taken: dict[str, Callable[[Routed], None]] = {"watched": lambda _: None, "added": self.add}
        watch = None
        if variant in taken:
            begin = {"watched": lambda _: _nothing, "added": self.begin}[variant]
            watch = ExpertWatch(self.model.model, self.info, self.info.layers, taken[variant], begin)
        began, busy = time.perf_counter(), time.process_time()
        if watch is not None:
            watch.start(*self.ids.shape)
        with torch.inference_mode():
            self.model.model(self.ids)
        if watch is not None:
            watch.end()
        found = time.perf_counter() - began, time.process_time() - busy
        if watch is not None:
            watch.detach()
        return found


def measure(arguments: argparse.Namespace, implementation: str) -> dict[str, Any]:
    """Of each clock: median seconds of each variant, and ratios to the bare pass of the same round (median, least, greatest)."""
    bench = Bench(arguments, implementation)
    for variant in VARIANTS:  # first touches, and what is compiled
        bench.run(variant)
    rounds = []
    for number in range(arguments.rounds):
        names = VARIANTS if number % 2 == 0 else VARIANTS[::-1]
        rounds.append({name: bench.run(name) for name in names})
    return {
        clock: _compared([{n: found[n][place] for n in found} for found in rounds])
        for place, clock in enumerate(CLOCKS)
    }


def _compared(rounds: list[dict[str, float]]) -> dict[str, Any]:
    bare = sorted(found["bare"] for found in rounds)
    ratios = {name: sorted(found[name] / found["bare"] for found in rounds) for name in VARIANTS[1:]}
    return {
        "seconds": {name: statistics.median(found[name] for found in rounds) for name in VARIANTS},
        "bare_seconds": [bare[0], bare[-1]],
        "least": {name: min(found[name] for found in rounds) / bare[0] for name in VARIANTS[1:]},
        "ratios": {name: [statistics.median(found), found[0], found[-1]] for name, found in ratios.items()},
    }


def tell(implementation: str, clocks: dict[str, Any]) -> None:
    """Print the figures of one implementation."""
    for clock, figures in clocks.items():
        seconds, spread, ratios = figures["seconds"], figures["bare_seconds"], figures["ratios"]
        print(f"{implementation}, {clock}: bare {seconds['bare']:.3f} s ({spread[0]:.3f} to {spread[1]:.3f})")
        for name, (median, lower, upper) in ratios.items():
            at_least = figures["least"][name]
            print(
                f"  {name:8} {seconds[name]:.3f} s  x{median:.3f} ({lower:.3f} to {upper:.3f}), least x{at_least:.3f}"
            )
        loops = ratios["added"][0] - ratios["watched"][0]
        print(
            f"  of the bare pass: hooks and modes {ratios['watched'][0] - 1:+.1%}, table and sums {loops:+.1%}",
            flush=True,
        )
    if implementation in TARGETS:
        print(f"  wanted: at most x{TARGETS[implementation]:.2f}", flush=True)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--hidden", type=int, default=2048, help="hidden size, a multiple of 512 (2048: that of Qwen3-30B-A3B)"
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help=f"of a pass, in {SEQUENCES} sequences")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--implementations", default="grouped_mm,eager")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "dtype": arguments.dtype}
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads, {arguments.tokens} tokens", flush=True)
    for implementation in arguments.implementations.split(","):
        figures[implementation] = measure(arguments, implementation)
        tell(implementation, figures[implementation])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
