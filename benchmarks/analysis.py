"""The cost of analysis: the lazy analysis, its lower bounds and the earlier pipeline, as ratios in one run.

    python -m benchmarks.analysis                 three data sets, about six minutes, 7 GB of disk, 10 GB of memory
    python -m benchmarks.analysis --small         the same in some seconds, for a look

Data sets, all bfloat16:

    smollm2   SmolLM2-135M on CPython's documentation, attn_in and mlp_in, 64 x 512 tokens: 2.3 GB
    qwen3     the shape of Qwen3-30B-A3B, random with planted outliers: 48 layers, 2 sites, 4 x 2048 tokens, 2048 features: 3.2 GB
    dense     the same shape of fewer layers, 1% of all values are hits

Variants, in turn within each round, files in the page cache:

    read      (a) reading the same bytes into a buffer of 256 KB
    absmax    (b) numpy's abs().max() over the same bytes in memory, 512 MB at a time
    absmax by chunk: the same chunk by chunk (8 MB at most), whose temporaries numpy can use again: its best
    copy      numpy.copyto of the same bytes in memory, into memory that was written before; `copy new`: ndarray.copy()
    one       our analysis of the files, all statistics, one thread
    all       the same with a thread for each core
    earlier   (c) everything loaded as float32, then a Python loop over every outlier (`benchmarks.counting.earlier`)

`kernels` compares numpy, torch and the project's own loops on one chunk of both sites in memory, one thread each. Peak
memory is of processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import counting
from outliers.corpus.kinds import KINDS
from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import TILE_BYTES, WorkItem, layout_of_capture, summarize
from outliers.counting.summary import Frame
from outliers.spec import CriteriaSpec, StudySpec
from outliers.store.chunks import ChunkFiles, Journal, create_arrays
from outliers.store.durable import Unsynced
from outliers.store.fingerprint import shapes_of, write_fingerprint
from outliers.study.layout import Layout
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace

SITES = ("attn_in", "mlp_in")
CORES = os.cpu_count() or 1
BUFFER = 256 * 1024
WHOLE_BYTES = 512 * 1024 * 1024
VARIANTS = ("read", "absmax", "absmax by chunk", "copy", "copy new", "one", "all", "earlier")


@dataclass
class Data:
    """One capture, and its bytes in memory where a variant asks for them."""

    name: str
    part: WorkItem
    layout: Layout

    @property
    def bytes(self) -> int:
        return self.layout.activation_bytes

    def paths(self) -> Iterator[Path]:
        files = ChunkFiles(self.part.folder, self.layout)
        for sequence in self.part.sequences:
            for layer in range(len(self.layout.layers)):
                for chunk in range(self.layout.position_chunks):
                    for site in self.layout.stored:
                        yield files.path(site, layer, sequence, chunk)

    def arrays(self) -> tuple[list[NDArray[np.uint16]], list[NDArray[np.uint16]]]:
        """All values in memory: in arrays of WHOLE_BYTES or less, and as views of those, a chunk each, (position, feature)."""
        width = next(iter(self.layout.widths.values()))
        paths = list(self.paths())
        size = self.layout.largest_chunk_bytes // 2
        each = max(1, WHOLE_BYTES // (2 * size))
        wholes, chunks = [], []
        for at in range(0, len(paths), each):
            few = paths[at : at + each]
            whole = np.empty(len(few) * size, np.uint16)
            for number, path in enumerate(few):
                chunks.append(whole[number * size : (number + 1) * size].reshape(-1, width))
                np.copyto(chunks[-1], np.fromfile(path, np.uint16).reshape(-1, width))
            wholes.append(whole)
        return wholes, chunks


def part_of(folder: Path, layout: Layout, marks: NDArray[np.bool_], target: Path) -> WorkItem:
    """All sequences of a capture by the default criteria."""
    criteria = CriteriaSpec()
    frame = Frame(
        study_id="benchmark",
        dtype=layout.dtype,
        widths=tuple(layout.widths.items()),
        num_layers=len(layout.layers),
        positions=layout.positions,
        magnitude=criteria.magnitude,
        ladder=criteria.magnitudes,
        site="block",
    )
    lengths = np.full(layout.num_sequences, layout.positions, np.int32)
    return WorkItem(folder, frame, tuple(range(layout.num_sequences)), lengths, marks, target)


def smollm2(scratch: Path, arguments: argparse.Namespace) -> Data:
    """A real capture."""
    from outliers.capture.extract import extract
    from outliers.events.stream import reporter_from_environment

    workspace = open_workspace(arguments.workspace)
    sequences, length = (2, 64) if arguments.small else (64, 512)
    spec = {
        "model": {"id": "builtin:smollm2", "dtype": "bfloat16"},
        "corpus": {"source": "builtin:python-docs", "num_sequences": sequences, "sequence_length": length},
    }
    prepared = prepare(StudySpec.model_validate(spec), workspace)
    corpus = load_corpus(prepared.corpus, workspace)
    tell(f"capturing SmolLM2, {sequences} x {length} tokens")
    place = open_workspace(scratch / "workspace")
    for name in ("models", "corpora"):
        (place.root / name).symlink_to(workspace.root / name)
    extract(prepared, place, reporter_from_environment())
    folder = place.capture(prepared.capture_id)
    return Data(
        "smollm2", part_of(folder, layout_of_capture(folder), corpus.marks(), scratch), layout_of_capture(folder)
    )


def random_capture(
    name: str, scratch: Path, layers: int, sequences: int, length: int, width: int, share: float
) -> Data:
    """Random activations: normal, a few planted features that hit often, and `share` of all values a hit."""
    tell(f"writing {name}: {layers} layers, {sequences} x {length} tokens, {width} features")
    rng = np.random.default_rng(0)
    widths = dict.fromkeys(SITES, width)
    layout = Layout(widths, tuple(range(layers)), sequences, length, "bfloat16", "none")
    folder = scratch / name
    folder.mkdir(parents=True)
    lengths = np.full(sequences, length, np.int32)
    create_arrays(folder, layout, np.zeros((sequences, length), np.int32), lengths)
    write_fingerprint(folder, {"fixed": {"format": 1}, "layout": shapes_of(layout), "threads": 1})
    files, journal = ChunkFiles(folder, layout), Journal(folder / "journal.jsonl")
    planted = rng.choice(width, 6, replace=False)
    for sequence in range(sequences):
        unsynced = Unsynced(files.root)
        entry: dict[str, Any] = {"sequence": sequence, "crc32": {}, "sizes": {}, "bytes": 0}
        for site in SITES:
            chunks = []
            for layer in range(layers):
                values = rng.standard_normal((length, width), np.float32)
                values *= 0.7
                if layer >= layers // 3:
                    values[:, planted] += 8 * np.sign(rng.standard_normal(6)).astype(np.float32)
                if share:
                    values[rng.random(values.shape, np.float32) < share] = 7.5
                chunks += files.write(site, layer, sequence, (values.view(np.uint32) >> 16).astype(np.uint16), unsynced)
            entry["crc32"][site], entry["sizes"][site] = [c for c, _ in chunks], [n for _, n in chunks]
        unsynced.sync()
        journal.append([entry])
    return Data(name, part_of(folder, layout, rng.random((sequences, len(KINDS), length)) < 0.1, scratch), layout)


def read(data: Data) -> None:
    """Every byte through one buffer."""
    buffer = memoryview(bytearray(BUFFER))
    for path in data.paths():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def ours(data: Data, workers: int) -> None:
    """All statistics, from the files."""
    with tempfile.TemporaryDirectory(dir=data.part.target) as target:
        summarize(WorkItem(**(data.part.__dict__ | {"target": Path(target)})), workers)


def earlier(data: Data, arrays: list[NDArray[np.uint16]]) -> None:
    """The earlier pipeline's way, over all sequences; its tensors are in the page cache, as the files are for ours."""
    count = len(arrays) // len(data.part.sequences)
    counting.earlier(
        list(
            enumerate(np.fromfile(path, np.uint16).reshape(array.shape) for path, array in zip(paths, own, strict=True))
        )
        for paths, own in _by_sequence(data, arrays, count)
    )


def _by_sequence(
    data: Data, arrays: list[NDArray[np.uint16]], count: int
) -> Iterator[tuple[list[Path], list[NDArray[np.uint16]]]]:
    paths = list(data.paths())
    for at in range(0, len(arrays), count):
        yield paths[at : at + count], arrays[at : at + count]


def measure_data(data: Data, rounds: int) -> dict[str, Any]:
    """Seconds of every variant, medians, and ratios of ours to each, medians of the rounds' own."""
    wholes, arrays = data.arrays()
    spare = [np.zeros_like(array) for array in arrays]
    variants: dict[str, Callable[[], object]] = {
        "read": lambda: read(data),
        "absmax": lambda: [counting.absmax(array) for array in wholes],
        "absmax by chunk": lambda: [counting.absmax(array) for array in arrays],
        "copy": lambda: [np.copyto(there, array) for there, array in zip(spare, arrays, strict=True)],
        "copy new": lambda: [array.copy() for array in arrays],
        "one": lambda: ours(data, 1),
        "all": lambda: ours(data, CORES),
        "earlier": lambda: earlier(data, arrays),
    }
    seconds: list[dict[str, float]] = []
    for number in range(rounds):
        found = {}
        # every other round backwards: what a machine does meanwhile falls on all
        for name in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            began = time.perf_counter()
            variants[name]()
            found[name] = time.perf_counter() - began
            tell(f"{data.name}, round {number + 1} of {rounds}: {name} {found[name]:.2f} s")
        seconds.append(found)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(found[slow] / found[fast] for found in seconds)

    return {
        "bytes": data.bytes,
        "seconds": {name: statistics.median(found[name] for found in seconds) for name in VARIANTS},
        "one over": {name: ratio(name, "one") for name in VARIANTS if name not in ("one", "all")},
        "all over": {name: ratio(name, "all") for name in ("one", "earlier")},
    }


def measure_kernels(data: Data, rounds: int) -> dict[str, float]:
    """GB/s of all statistics by each library, on one chunk of each site in memory, one thread."""
    from outliers.counting.accumulate import Span, Tally

    one, other = data.arrays()[1][-2:]
    frame = data.part.frame
    peaks = np.zeros((3, *one.shape), np.uint16)
    floats = torch.zeros((3, *one.shape))
    tally = Tally(frame)
    rows = max(4, TILE_BYTES // (2 * one.shape[1]) // 4 * 4)

    def tiles(layer: int) -> Iterator[dict[str, NDArray[Any]]]:
        for at in range(0, one.shape[0], rows):
            yield {"attn_in": one[at : at + rows], "mlp_in": other[at : at + rows]}

    layers = min(8, frame.num_layers)

    def compiled() -> None:
        tally.count(
            Span(0, 0, one.shape[0], np.zeros((len(KINDS), one.shape[0]), np.bool_)), range(layers), tiles, rows
        )

    ways = {
        "numpy": lambda: counting.by_numpy(one, other, peaks),
        "torch": lambda: counting.by_torch(one, other, floats),
        "numba": compiled,
        "numpy, abs().max() alone": lambda: (counting.absmax(one), counting.absmax(other)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    torch.set_num_threads(1)
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            found[name].append((time.perf_counter() - began) / (layers if name == "numba" else 1))
    torch.set_num_threads(CORES)
    return {name: (one.nbytes + other.nbytes) / statistics.median(times[1:]) / 1e9 for name, times in found.items()}


def peak(data: Data, sequences: int) -> int:
    """Peak RSS in bytes of a process of its own that analyzes the first sequences."""
    code = (
        "import pickle, sys\n"
        "from outliers.counting.analyze import summarize\n"
        "summarize(pickle.load(sys.stdin.buffer), int(sys.argv[1]))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    import pickle

    part = data.part
    chosen = slice(0, sequences)
    with tempfile.TemporaryDirectory(dir=part.target) as target:
        few = WorkItem(
            part.folder, part.frame, part.sequences[chosen], part.lengths[chosen], part.marks[chosen], Path(target)
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(CORES)], input=pickle.dumps(few), stdout=subprocess.PIPE, check=True
        )
    return int(done.stdout) * 1024


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.scratch))
    shape = (2, 2, 64, 256) if arguments.small else (48, 4, 2048, 2048)
    try:
        sets = {
            "smollm2": lambda: smollm2(scratch / "smollm2", arguments),
            "qwen3": lambda: random_capture("qwen3", scratch / "qwen3", *shape, 0.0),
            "dense": lambda: random_capture("dense", scratch / "dense", 2 if arguments.small else 6, *shape[1:], 0.01),
        }
        figures: dict[str, Any] = {"cores": CORES, "rounds": arguments.rounds, "data": {}, "memory": {}}
        for name, make in sets.items():
            if name not in arguments.only:
                continue
            (scratch / name).mkdir()
            data = make()
            ours(data, CORES)  # warm: compiled loops, page cache
            figures["data"][name] = measure_data(data, arguments.rounds)
            if name != "dense":
                count = len(data.part.sequences)
                figures["memory"][name] = {str(n): peak(data, n) for n in sorted({max(1, count // 8), count})}
            if name == "qwen3":
                figures["kernels"] = measure_kernels(data, arguments.rounds)
            shutil.rmtree(scratch / name)
    finally:
        shutil.rmtree(scratch)
    return figures


def tell(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"bfloat16, {figures['cores']} cores, medians of {figures['rounds']} rounds"]
    for name, found in figures["data"].items():
        size, seconds = found["bytes"], found["seconds"]
        lines += [
            "",
            f"{name}, {size / 1e9:.2f} GB:",
            "",
            "| variant | seconds | GB/s | takes, of ours on one core |",
            "|---|---|---|---|",
        ]
        for variant in VARIANTS:
            share = found["one over"].get(variant)
            lines.append(
                f"| {variant} | {seconds[variant]:.2f} | {size / seconds[variant] / 1e9:.2f} | "
                f"{'' if share is None else f'{share:.2f}'} |"
            )
        lines += ["", ", ".join(f"{other} / all = {value:.2f}" for other, value in found["all over"].items())]
    if "kernels" in figures:
        lines += ["", "| all statistics, one thread, in memory | GB/s |", "|---|---|"]
        lines += [f"| {name} | {rate:.2f} |" for name, rate in figures["kernels"].items()]
    if figures["memory"]:
        lines += ["", "| peak memory | sequences | MB |", "|---|---|---|"]
        for name, found in figures["memory"].items():
            lines += [f"| {name} | {count} | {size / 1e6:.0f} |" for count, size in found.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=["smollm2", "qwen3", "dense"], metavar="SETS"
    )
    parser.add_argument("--small", action="store_true", help="little data: the figures say nothing")
    parser.add_argument("--workspace", metavar="DIR", help="where the model and the corpus are kept")
    parser.add_argument("--scratch", metavar="DIR", help="where captures are written meanwhile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1 if arguments.small else CORES)
    figures = measure(arguments)
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
