"""All that no CPU can show, in one command on a machine with a GPU, in less than eight minutes and without a network.

    python -m benchmarks.gpu_capture                                    random models, made on the device
    python -m benchmarks.gpu_capture --json figures.json --seconds 300
    python -m benchmarks.gpu_capture --model Qwen/Qwen3-30B-A3B --split 2 --parts costs,waits
    python -m benchmarks.gpu_capture --device cpu --hidden 64 --layers 2 --length 32 --rounds 1      tries the script itself

Its parts, each of which can be asked for alone (--parts):

    costs     a bare pass, hooks, copies, the capture to disk; whether the disk has every tensor of the model (`gpu_costs`)
    waits     how often a pass waits for the GPU, and whether hooks add to that (`gpu_waits`)
    kernels   the counts of the device's kernels compared with the processor's, microseconds a layer (`gpu_kernels`)
    study     a capture twice, one that is killed and resumed, batches of 1, 4 and 8, memory compared with the plan (`gpu_study`)

With several GPUs the costs are measured again with the model split over two. A part that the time (--seconds) no longer allows
is left out by name. After the figures it says what each of them decides, and whether that holds.

Exit codes: 0 everything is equal and within its bounds, 1 something is not, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import zarr

from benchmarks import gpu_kernels, gpu_study, gpu_waits
from benchmarks.gpu_costs import Bench, measure, show
from benchmarks.gpu_models import placed, placements, random_model, refusal
from outliers.planning.estimate import GPU_EFFICIENCY, find_card, flops_per_token
from outliers.spec import StudySpec
from outliers.study.prepare import model_info
from outliers.workspace import open_workspace

PARTS = ("costs", "waits", "kernels", "study")
SHARES = {"costs": 0.3, "study": 0.85}
"""Of the time, when a part begins nothing new; the rest is for what it has begun, and for the parts after it."""


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All figures of one run of the script."""
    began = time.monotonic()

    def until(part: str) -> float:
        return began + arguments.seconds * SHARES[part]

    figures: dict[str, Any] = {"runs": [], "left_out": []}
    if "costs" in arguments.parts or "waits" in arguments.parts:
        figures |= costs(arguments, scratch, until("costs"))
    if "kernels" in arguments.parts:
        sizes = (arguments.hidden, arguments.length, min(4, arguments.layers), 1)
        figures["kernels"] = gpu_kernels.measure(torch.device(arguments.device), *sizes, arguments.dtype)
        print(f"\nkernels: {json.dumps(figures['kernels'])}")
    if "study" in arguments.parts:
        if time.monotonic() - began > arguments.seconds * 0.5:
            figures["left_out"].append("study")
        else:
            figures["study"] = study(arguments, scratch / "study", until("study"))
    figures["seconds"] = round(time.monotonic() - began, 1)
    return figures


def costs(arguments: argparse.Namespace, scratch: Path, until: float) -> dict[str, Any]:
    """The parts `costs` and `waits`, with one model in memory."""
    workspace = open_workspace(arguments.workspace or scratch / "workspace")
    spec = StudySpec.model_validate(
        {
            "model": {"id": arguments.model or random_model(arguments, scratch / "model"), "dtype": arguments.dtype},
            "corpus": {"num_sequences": arguments.sequences, "sequence_length": arguments.length},
            "capture": {"sites": arguments.sites.split(",")},
            "criteria": {"site": arguments.sites.split(",")[0]},
        }
    )
    info = model_info(spec, workspace)
    runs, waits = [], None
    for devices in placements(arguments):
        if runs and time.monotonic() > until:
            break
        bench = Bench(spec, info, placed(info, workspace, devices), devices, scratch)
        bench.slots = arguments.slots or bench.slots
        if "costs" in arguments.parts:
            runs.append(measure(bench, arguments.rounds, until))
            show(runs[-1])
        if "waits" in arguments.parts and waits is None:
            waits = gpu_waits.measure(bench)
            print(f"\nwaits of one pass: {json.dumps(waits)}")
        del bench
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return {
        "model": arguments.model or f"random {arguments.family}",
        "parameters": info.total_parameters,
        "flops_per_token": flops_per_token(info, arguments.length),
        "dtype": info.dtype,
        "shape": [arguments.sequences, arguments.length],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zarr": zarr.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "cuda": torch.version.cuda,
        "runs": runs,
        "waits": waits,
    }


def study(arguments: argparse.Namespace, scratch: Path, until: float) -> dict[str, Any]:
    """The part `study`: a mixture of experts, in processes of its own."""
    scratch.mkdir()
    sizes = argparse.Namespace(
        family="qwen3moe",
        hidden=arguments.hidden,
        layers=min(arguments.layers, arguments.study_layers),
        sequences=arguments.study_sequences,
        length=arguments.length,
        device=arguments.device,
    )
    figures = gpu_study.run(sizes, scratch, until)
    gpu_study.show(figures)
    shutil.rmtree(scratch)
    return figures


def decisions(figures: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """(whether it holds, what is decided by it) of each figure; None where a figure decides a constant, and nothing can fail."""
    found: list[tuple[bool | None, str]] = []
    for one in figures["runs"]:
        on = " + ".join(one["devices"])
        found += [
            (one["equal"], f"{on}: every tensor on disk is the model's own: captures on such a GPU can be believed"),
            (one["within_bound"], f"{on}: pinned memory is within the ring: `plan` asks for enough main memory"),
        ]
        ratio = one["ratio_to_bare"]
        found.append((None, f"{on}: copies cost {ratio['copy']:.3f} of a bare pass, the disk {ratio['full']:.3f}"))
        card = find_card(one["devices"][0])
        if card is not None:
            peak = getattr(card, figures["dtype"]) * 1e12
            share = figures["flops_per_token"] * one["tokens_per_second"]["full"] / peak
            found.append((None, f"{on}: {share:.3f} of its peak; `estimate.GPU_EFFICIENCY` is {GPU_EFFICIENCY:g}"))
    waits = figures.get("waits")
    if waits and waits["bare"] is not None:
        same = waits["captured"] <= waits["bare"]
        found.append((same, f"{waits['captured']} waits a captured pass, {waits['bare']} a bare one: hooks add none"))
    if (kernels := figures.get("kernels")) is not None:
        left_out = kernels.get("left_out")
        found.append((None, f"kernels: {left_out}") if left_out else (kernels["equal"], _kernels(kernels)))
    if (study := figures.get("study")) is not None:
        found += _of_study(study)
    return found


def _kernels(found: dict[str, Any]) -> str:
    unlike = f" except {', '.join(found['unlike'])}" if found["unlike"] else ""
    each = f"{found['microseconds_a_layer']:.0f} µs a layer of {found['tokens']:,} tokens"
    return f"kernels count what the processor counts{unlike}, {each}: what --store none costs a pass"


def _of_study(found: dict[str, Any]) -> list[tuple[bool | None, str]]:
    rates = {batch: row["extract"]["tokens_per_second"] for batch, row in found["batches"].items()}
    first = next(iter(rates.values()), 0.0)
    told = ", ".join(f"{rate:.0f} at {batch} ({rate / first:.2f})" for batch, rate in rates.items())
    return [
        (found["twice_equal"], "the same capture twice has the same bits: results of this GPU can be compared"),
        (found["killed_equal"], f"killed after {found['killed_after']} sequences and resumed, it has the same bits"),
        (found["counts_equal"], "and the same counts"),
        (
            gpu_study.is_within(found),
            "memory that torch reserved is within the plan: `plan` offers GPUs that hold the study",
        ),
        (None, f"tokens a second of a mixture by sequences a batch: {told}; `plan` recommends 4 to 8"),
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_capture", description="What capturing costs on a GPU."
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=420, help="after 85%% of these nothing new begins")
    parser.add_argument("--model", help="for costs: a hub id, a folder, a GGUF file (default: random weights)")
    parser.add_argument("--family", choices=("llama", "qwen3moe"), default="llama", help="of the random model of costs")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size of random models, a multiple of 64")
    parser.add_argument("--layers", type=int, default=16, help="layers of the random model")
    parser.add_argument("--study-layers", type=int, default=8, help="at most, of the random model of the study")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--sites", default="attn_in,mlp_in,resid")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--study-sequences", type=int, default=24)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slots", type=int, help="slots of the ring (default: what a study would take)")
    parser.add_argument(
        "--split", type=int, help="GPUs to split the model over (default: 1, then 2 where there are two)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workspace", help="for what is remembered of --model")
    parser.add_argument("--scratch", help="folder on the disk that is measured (default: the system's temporary one)")
    parser.add_argument("--json", type=Path, help="file for the figures, which are printed too")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts.split(",")
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"--parts: {','.join(sorted(unknown))} is not known; known are {', '.join(PARTS)}")
    return arguments


def main() -> int:
    """0 everything equal and within its bounds, 1 something is not, 2 no GPU."""
    arguments = parse()
    reason = refusal(arguments)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    scratch = Path(tempfile.mkdtemp(prefix="gpu-capture-", dir=arguments.scratch))
    try:
        figures = run(arguments, scratch)
    finally:
        shutil.rmtree(scratch)
    decided = decisions(figures)
    text = json.dumps(figures | {"decisions": decided}, indent=1)
    print(f"\n{text}\n")
    for holds, what in decided:
        print(f"{'figure' if holds is None else 'holds ' if holds else 'FAILS '}  {what}")
    for part in figures["left_out"]:
        print(f"left out for want of time: {part} (--seconds, --parts {part})")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 1 if any(holds is False for holds, _ in decided) else 0


if __name__ == "__main__":
    sys.exit(main())
