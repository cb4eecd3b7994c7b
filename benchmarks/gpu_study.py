"""A study's own steps on a GPU: is a capture repeatable, does a killed one resume to the same bits, what does batching give?

    python -m benchmarks.gpu_study                                   a random Qwen3-like mixture of experts, no network
    python -m benchmarks.gpu_study --family llama --json figures.json
    python -m benchmarks.gpu_study --device cpu --hidden 64 --layers 2 --length 64 --sequences 8     tries the script itself

Every step is `python -m outliers` in a process of its own, as a job runs it. Reported are:

    twice      two captures of one study, in two workspaces: the checksum of every chunk, compared
    killed     a third one, ended by SIGKILL after some sequences and started again: the same
    batches    tokens a second at 1, 4 and 8 sequences a pass (each is another study, for it moves the last bits)
    memory     the most that torch reserved on each device, and the bytes that `plan` asks for
    counted    the summary of the repeated capture equals that of the first, file by file

Exit codes: 0 everything is equal and within its bounds, 1 something is not, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu_models import random_model, refusal
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import Prepared, prepare
from outliers.workspace import Workspace, open_workspace

BATCHES = (1, 4, 8)
PLANNED = ("ring_bytes", "activation_bytes", "vram_bytes", "ram_bytes", "host_ram_bytes")
WATCHED = """
import json, sys, torch
from outliers.__main__ import main
code = main(sys.argv[2:])
peaks = [torch.cuda.max_memory_reserved(n) for n in range(torch.cuda.device_count())]
open(sys.argv[1], "w").write(json.dumps(peaks))
sys.exit(code)
"""
"""`python -m outliers` that leaves the most bytes that torch reserved on each GPU in a file."""


class Study:
    """One study of the random model in a workspace of its own."""

    def __init__(self, spec: dict[str, Any], root: Path) -> None:
        self.root = root
        self.workspace: Workspace = open_workspace(root)
        self.prepared: Prepared = prepare(StudySpec.model_validate(spec), self.workspace)
        self._file = root / "spec.json"
        self._file.write_text(self.prepared.model_dump_json())
        self.peaks: list[int] = []

    @property
    def capture(self) -> Path:
        return self.workspace.capture(self.prepared.capture_id)

    def start(self, verb: str) -> subprocess.Popen[str]:
        """A step as a process; its log goes to a file of the workspace."""
        argv = [sys.executable, "-c", WATCHED, str(self.root / "peaks.json"), verb, str(self._file)]
        log = (self.root / f"{verb}.log").open("a")
        return subprocess.Popen(
            [*argv, "--workspace", str(self.root)], stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ)
        )

    def run(self, verb: str) -> dict[str, Any]:
        """A step to its end; returns what it reports. RuntimeError with the end of its log."""
        said, _ = (process := self.start(verb)).communicate()
        if process.returncode:
            raise RuntimeError(
                f"{verb} ended with {process.returncode}: {(self.root / f'{verb}.log').read_text()[-3000:]}"
            )
        self.peaks = json.loads((self.root / "peaks.json").read_text())
        return dict(json.loads(said))

    def journaled(self) -> int:
        """Sequences that are in the journal now."""
        try:
            return (self.capture / "journal.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def kill_after(self, sequences: int) -> int:
        """Begin to extract and SIGKILL it once `sequences` are journaled; returns how many were."""
        process = self.start("extract")
        while process.poll() is None and self.journaled() < sequences:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        return self.journaled()

    def checksums(self) -> dict[int, Any]:
        """Sequence -> the checksums of its chunks, as the journal has them."""
        lines = [json.loads(line) for line in (self.capture / "journal.jsonl").read_text().splitlines()]
        return {line["sequence"]: line["crc32"] for line in lines if "crc32" in line}

    def counts(self) -> dict[str, bytes]:
        """Array -> bytes of the totals of its summary."""
        totals = self.workspace.summary(self.prepared.capture_id, self.prepared.study_id) / "totals.npz"
        with np.load(totals, allow_pickle=False) as stored:
            return {name: stored[name].tobytes() for name in stored.files}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer in which every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def run(arguments: argparse.Namespace, scratch: Path, until: float = float("inf")) -> dict[str, Any]:
    """All figures of one run of the script. until: on the monotonic clock; no further size of a batch begins later."""
    folder = Path(random_model(arguments, scratch / "model"))
    save_tokenizer(folder)
    spec: dict[str, Any] = {
        "model": {"id": str(folder), "dtype": "bfloat16"},
        "corpus": {
            "source": "builtin:python-docs",
            "num_sequences": arguments.sequences,
            "sequence_length": arguments.length,
        },
        "capture": {"sites": ["attn_in", "mlp_in", "resid"]},
        "compute": {"gpu_count": 0} if arguments.device == "cpu" else {},
    }
    first = Study(spec, scratch / "first")
    figures: dict[str, Any] = {"parameters": first.prepared.model.total_parameters, "batches": {}}
    made = first.run("extract")
    figures |= {
        "device": made["device"],
        "extract": made,
        "planned_bytes": {
            name: getattr(demand_of(first.prepared.spec, first.prepared.model), name) for name in PLANNED
        },
    }
    figures["reserved_bytes"] = first.peaks
    again = Study(spec, scratch / "again")
    figures["again"] = again.run("extract")
    figures["twice_equal"] = again.checksums() == first.checksums()
    killed = Study(spec, scratch / "killed")
    figures["killed_after"] = killed.kill_after(max(1, arguments.sequences // 3))
    figures["resumed"] = killed.run("extract")
    figures["killed_equal"] = killed.checksums() == first.checksums()
    figures["analysis"] = first.run("analyze")
    killed.run("analyze")
    figures["counts_equal"] = killed.counts() == first.counts()
    for study in (first, again, killed):
        shutil.rmtree(study.root)
    for batch in BATCHES:
        if time.monotonic() > until:
            break
        one = Study(spec | {"capture": spec["capture"] | {"batch_sequences": batch}}, scratch / f"batch-{batch}")
        found = one.run("extract")
        planned = demand_of(one.prepared.spec, one.prepared.model).vram_bytes
        figures["batches"][batch] = {"extract": found, "planned_vram_bytes": planned, "reserved_bytes": one.peaks}
        shutil.rmtree(one.root)
    return figures


def show(found: dict[str, Any]) -> None:
    """The figures as a table."""
    print(f"\n{found['device']}: {found['parameters'] / 1e9:.2f}B parameters, {found['extract']['tokens']} tokens")
    for name in ("twice_equal", "killed_equal", "counts_equal"):
        print(
            f"{name:14} {found[name]}" + (f" (killed after {found['killed_after']})" if name == "killed_equal" else "")
        )
    print(f"{'batch':>6}{'tokens/s':>12}{'load s':>9}{'reserved GB':>13}{'planned GB':>12}{'waited s':>10}")
    for batch, row in found["batches"].items():
        made, peak = row["extract"], max(row["reserved_bytes"], default=0)
        print(
            f"{batch:>6}{made['tokens_per_second']:>12.0f}{made['load_seconds']:>9.1f}{peak / 1e9:>13.2f}"
            f"{row['planned_vram_bytes'] / 1e9:>12.2f}{made['ring_waited_seconds']:>10.2f}"
        )


def is_within(figures: dict[str, Any]) -> bool:
    """Whether no device had more memory reserved than `plan` asks for."""
    return all(
        peak <= row["planned_vram_bytes"] for row in figures["batches"].values() for peak in row["reserved_bytes"]
    )


def is_equal(figures: dict[str, Any]) -> bool:
    """Whether a capture that was made twice, and one that was killed and resumed, are the first one, and so are its counts."""
    return bool(figures["twice_equal"] and figures["killed_equal"] and figures["counts_equal"])


def main() -> int:
    """0 everything is equal and within its bounds, 1 something is not, 2 no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_study", description="A study's steps on a GPU.")
    parser.add_argument("--family", choices=("llama", "qwen3moe"), default="qwen3moe", help="of the random model")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each sequence")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scratch", help="folder on the disk that is used (default: the system's temporary one)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    reason = refusal(argparse.Namespace(device=arguments.device, split=None))
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    scratch = Path(tempfile.mkdtemp(prefix="gpu-study-", dir=arguments.scratch))
    try:
        figures = run(arguments, scratch)
    finally:
        shutil.rmtree(scratch)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    within = is_within(figures)
    print("reserved memory is within the plan" if within else "RESERVED MEMORY IS BEYOND THE PLAN")
    return 0 if within and is_equal(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
