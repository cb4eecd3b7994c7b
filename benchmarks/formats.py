"""The cost of measuring number formats: each format's rate and the count's, and NVFP4 compared with numpy and torch.

    python -m benchmarks.formats                  about two minutes, half a gigabyte of memory
    python -m benchmarks.formats --small          the same in some seconds, for a look

One chunk of bfloat16 in memory, 2,048 tokens x 2,048 features with six planted outliers, one thread each, in turn within each
round. Rates are bytes of the chunk over the least time of the rounds, in which least other work was done on the machine:

    count        all statistics of `outliers.counting`, two sites of the block in one call
    FORMAT       squared error by sequence from the bits: reading float32 out of them included
    numpy        NVFP4's error by numpy, vectorised over 256 rows at a time: codes by comparing with the middles between them
    numpy, bits  the same with the rounding of our loops in numpy: adding a power of two and taking it away, in place
    torch        NVFP4's error by `outliers.quantization.emulate`
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.corpus.kinds import KINDS
from outliers.counting.accumulate import Span, Tally
from outliers.counting.analyze import TILE_BYTES as COUNT_BYTES
from outliers.counting.summary import Frame
from outliers.quantization.emulate import emulate
from outliers.quantization.kernels import tile as kernels
from outliers.quantization.measure import TILE_BYTES
from outliers.quantization.rules import Rule, padded
from outliers.spec import CriteriaSpec
from outliers.spec.formats import BASES, parse_format

SITES = ("attn_in", "mlp_in")
TOKENS, WIDTH = 2048, 2048
NUMPY_ROWS = 256
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
FORMATS = (*BASES, "had16+nvfp4", "had64+nvfp4")


def values(tokens: int, width: int) -> NDArray[np.uint16]:
    """(token, feature) bits of bfloat16."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((tokens, width), np.float32) * np.float32(0.7)
    found[:, rng.choice(width, 6, replace=False)] += 8
    return (found.view(np.uint32) >> 16).astype(np.uint16)


def ours(bits: NDArray[np.uint16], rule: Rule) -> float:
    """The error of a chunk, tile by tile, as `quantization.measure` has it."""
    width = bits.shape[1]
    rows = TILE_BYTES // (4 * padded(width))
    tile, good = np.empty((rows, padded(width)), np.float32), np.empty(rows, np.bool_)
    kept, scratch = np.ones(padded(width), np.float32), np.empty((3, padded(width)), np.float32)
    errors = np.zeros(padded(width))
    for at in range(0, bits.shape[0], rows):
        run = bits[at : at + rows]
        kernels.open_tile(run, kernels.BFLOAT16, tile[: len(run)], good[: len(run)])
        rule.add_errors(tile[: len(run)], good[: len(run)], kept, width, scratch, errors)
    return float(errors.sum())


def by_numpy(bits: NDArray[np.uint16], amax: float) -> float:
    """NVFP4 as it is usually written: a code for each value from comparisons with the middles, half to even by their sides."""
    overall = np.float32(1) / np.float32(amax) * np.float32(2688)
    total = 0.0
    for at in range(0, bits.shape[0], NUMPY_ROWS):
        x = (bits[at : at + NUMPY_ROWS].astype(np.uint32) << 16).view(np.float32)
        size = np.abs(x.reshape(-1, 16))
        local = _e4m3(overall * (size.max(1) / np.float32(6)))
        local[local == 0] = 0.125
        scale = (local / overall)[:, None]
        scaled = size / scale
        code = np.zeros(scaled.shape, np.int8)
        for number, middle in enumerate(MIDDLES):
            # from an even code up to the odd one a tie stays, from an odd one it goes up
            code += scaled > middle if number % 2 == 0 else scaled >= middle
        error = E2M1[code] * scale - size
        total += float(np.einsum("ij,ij->", error, error, dtype=np.float64))
    return total


def by_numpy_bits(bits: NDArray[np.uint16], amax: float) -> float:
    """NVFP4 in as few passes of numpy as there can be, arithmetic in place."""
    overall = np.float32(1) / np.float32(amax) * np.float32(2688)
    total = 0.0
    for at in range(0, bits.shape[0], NUMPY_ROWS):
        x = (bits[at : at + NUMPY_ROWS].astype(np.uint32) << 16).view(np.float32)
        groups = x.reshape(-1, 16)
        size = np.abs(groups)
        local = _e4m3(overall * (size.max(1) / np.float32(6)))
        local[local == 0] = 0.125
        scale = (local / overall)[:, None]
        scaled = size / scale
        np.minimum(scaled, np.float32(6), out=scaled)
        # to one bit behind the leading one, half to even
        power = (np.maximum(scaled.view(np.int32) & 0x7F800000, 127 << 23) + (22 << 23)).view(np.float32)
        scaled += power
        scaled -= power
        scaled *= scale
        scaled -= size
        total += float(np.einsum("ij,ij->", scaled, scaled, dtype=np.float64))
    return total


def _e4m3(x: NDArray[np.float32]) -> NDArray[np.float32]:
    size = np.minimum(x, np.float32(448))
    power = (np.maximum(size.view(np.int32) & 0x7F800000, 121 << 23) + (20 << 23)).view(np.float32)
    found: NDArray[np.float32] = (size + power) - power
    return found


def by_torch(bits: NDArray[np.uint16], amax: float) -> float:
    """NVFP4 by the functions that probes use."""
    x = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    return float((emulate(x, parse_format("nvfp4"), amax=amax) - x).double().square().sum())


def counter(bits: NDArray[np.uint16]) -> Callable[[], object]:
    """Counting every statistic of a chunk at both sites of the block."""
    criteria = CriteriaSpec()
    widths = dict.fromkeys(SITES, bits.shape[1])
    frame = Frame("benchmark", "bfloat16", tuple(widths.items()), 1, len(bits), 6.0, criteria.magnitudes, "block")
    tally, rows = Tally(frame), max(4, COUNT_BYTES // (2 * bits.shape[1]) // 4 * 4)
    marks = np.zeros((len(KINDS), len(bits)), np.bool_)
    own = bits.copy()  # what is not finite is set to 0 there

    def tiles(layer: int) -> Iterator[dict[str, NDArray[Any]]]:
        for at in range(0, len(own), rows):
            yield dict.fromkeys(SITES, own[at : at + rows])

    return lambda: tally.count(Span(0, 0, len(own), marks), range(1), tiles, rows)


def measure(rounds: int, tokens: int) -> dict[str, float]:
    """Least seconds of each variant, all in turn within each round."""
    bits = values(tokens, WIDTH)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    amax = np.abs(wide).max(0)
    top = float(amax.max())
    variants: dict[str, Callable[[], object]] = {
        "count": counter(bits),
        "numpy": lambda: by_numpy(bits, top),
        "numpy, bits": lambda: by_numpy_bits(bits, top),
        "torch": lambda: by_torch(bits, top),
    }
    for name in FORMATS:
        rule = Rule.of(parse_format(name), WIDTH, amax)
        variants[name] = lambda rule=rule: ours(bits, rule)
    # the lambdas of a dictionary have no common type; these four give a number
    same = [float(variants[name]()) for name in ("nvfp4", "numpy", "numpy, bits", "torch")]  # type: ignore[arg-type]
    if max(same) - min(same) > 1e-6 * max(same):
        sys.exit(f"the four ways of NVFP4 give other errors: {same}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            if number:  # the first round compiles
                seconds[name].append(time.perf_counter() - began)
    return {name: min(times) for name, times in seconds.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="rounds after the one that compiles")
    parser.add_argument("--small", action="store_true", help="256 tokens, three rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens, rounds = (256, 3) if arguments.small else (TOKENS, arguments.rounds)
    found = measure(rounds, tokens)
    size = tokens * WIDTH * 2
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(
        f"{tokens:,} tokens x {WIDTH:,} features, {rounds} rounds, load of the machine {load}, {os.cpu_count()} cores"
    )
    for name, seconds in found.items():
        both = 2 if name == "count" else 1
        print(f"{name:14} {both * size / seconds / 1e9:8.3f} GB/s")
    for name in ("numpy", "numpy, bits", "torch"):
        print(f"NVFP4: {found[name] / found['nvfp4']:.1f} times as fast as {name}")


if __name__ == "__main__":
    main()
