"""A capture a layer at a time compared with the whole pass: the most memory, the time, and whether every file is the same.

    python -m benchmarks.layers                       a dense model and a mixture, 24 layers of 40 MB each; some minutes
    python -m benchmarks.layers --layers 48 --json figures.json

Each capture runs in a process of its own, which says how much it held at most (VmHWM) beyond what it held before, with torch
and transformers loaded. By layers that must be at most two layers, the embedding, the rest and 150 MB. Weights are random;
shapes, and experts that are stored one by one, are those of a real model. The bits are compared by the journal and all files.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARGIN_BYTES = 150_000_000
HIDDEN = 512
KINDS = ("dense", "experts")
SCHEDULES = ("whole", "layers")


def make_model(folder: Path, kind: str, layers: int) -> None:
    """A checkpoint with layers of about 40 MB in bfloat16, all alike, a file each, with a tokenizer of bytes."""
    import torch
    import transformers

    from tests.support.tiny import save_tokenizer

    common: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32_768,
        "max_position_embeddings": 4096,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    if kind == "dense":
        config: Any = transformers.LlamaConfig(**common, intermediate_size=12_800)
    else:
        config = transformers.Qwen3MoeConfig(
            **common, intermediate_size=1024, moe_intermediate_size=384, num_experts=32, num_experts_per_tok=4
        )
    torch.manual_seed(0)
    config.num_hidden_layers = 1
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    config.num_hidden_layers = layers
    config.save_pretrained(folder)
    save_tokenizer(folder)
    _repeat_layer(folder, layers)


def _repeat_layer(folder: Path, layers: int) -> None:
    """A file for each layer with the weights of the first, one for all else, and their index: to make them takes no time."""
    from safetensors.torch import load_file, save_file

    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    own = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    files = {"model-00000.safetensors": {name: tensor for name, tensor in tensors.items() if name not in own}}
    for layer in range(layers):
        renamed = {name.replace(".layers.0.", f".layers.{layer}."): tensor for name, tensor in own.items()}
        files[f"model-{layer + 1:05}.safetensors"] = renamed
    for file, held in files.items():
        save_file(held, folder / file, {"format": "pt"})
    places = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def capture(folder: Path, workspace: Path, schedule: str, sequences: int, length: int) -> dict[str, Any]:
    """One capture in this process: seconds, memory before, the most memory, and what a layer and the rest take."""
    import torch

    from outliers.capture.extract import extract
    from outliers.events.stream import Lines
    from outliers.spec import StudySpec
    from outliers.steps import peak_rss_bytes
    from outliers.study.prepare import prepare
    from outliers.workspace import open_workspace

    torch.set_num_threads(1)
    spec = StudySpec.model_validate(
        {
            "model": {"id": str(folder)},
            "corpus": {"source": "builtin:python-docs", "num_sequences": sequences, "sequence_length": length},
            "capture": {"perplexity": True},
            "compute": {"schedule": schedule, "gpu_count": 0},
        }
    )
    own = open_workspace(str(workspace))
    study = prepare(spec, own)
    before, began = _resident_bytes(), time.monotonic()
    extract(study, own, Lines(logging.getLogger(__name__)))
    weights = study.model.weights
    return {
        "seconds": time.monotonic() - began,
        "bytes": peak_rss_bytes() - before,
        "layer_bytes": max(weights.layer_bytes),
        "around_bytes": weights.embedding_bytes + weights.rest_bytes,
        "capture": str(own.capture(study.capture_id)),
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def same_files(one: Path, other: Path) -> bool:
    """Whether two captures have the same files, apart from what holds times: locks, diaries, descriptions of sums."""
    aside = {"lock", "extractions.jsonl"}

    def is_content(path: Path) -> bool:
        return path.is_file() and path.name not in aside and (path.parent.name, path.suffix) != ("experts", ".json")

    found = [{str(p.relative_to(root)): p for p in root.rglob("*") if is_content(p)} for root in (one, other)]
    return found[0].keys() == found[1].keys() and all(
        found[0][name].read_bytes() == found[1][name].read_bytes() for name in found[0]
    )


def measure(kind: str, arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The figures of one kind: of each schedule the median seconds and the most memory."""
    folder = place / kind
    make = "from benchmarks.layers import make_model; from pathlib import Path; import sys; "
    make += "make_model(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
    subprocess.run([sys.executable, "-c", make, str(folder), kind, str(arguments.layers)], check=True)
    runs: dict[str, list[dict[str, Any]]] = {schedule: [] for schedule in SCHEDULES}
    for number in range(arguments.rounds):
        for schedule in SCHEDULES if number % 2 == 0 else SCHEDULES[::-1]:
            shape = [str(arguments.sequences), str(arguments.length)]
            workspace = place / f"{kind}-{schedule}-{number}"
            command = [
                sys.executable,
                "-m",
                "benchmarks.layers",
                "--one",
                str(folder),
                str(workspace),
                schedule,
                *shape,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[schedule].append(json.loads(done.stdout.splitlines()[-1]))
    whole, layers = (runs[schedule][0] for schedule in SCHEDULES)
    allowed = 2 * layers["layer_bytes"] + layers["around_bytes"] + MARGIN_BYTES
    peak = max(run["bytes"] for run in runs["layers"])
    seconds = {schedule: statistics.median(run["seconds"] for run in found) for schedule, found in runs.items()}
    return {
        "layer_bytes": layers["layer_bytes"],
        "around_bytes": layers["around_bytes"],
        "whole_bytes": max(run["bytes"] for run in runs["whole"]),
        "layers_bytes": peak,
        "allowed_bytes": allowed,
        "fits": peak <= allowed,
        "seconds": seconds,
        "ratio": seconds["layers"] / seconds["whole"],
        "same": same_files(Path(whole["capture"]), Path(layers["capture"])),
    }


def tell(kind: str, found: dict[str, Any]) -> None:
    """One line of a table."""
    mb = {name: f"{found[name] / 1e6:,.0f}" for name in found if name.endswith("_bytes")}
    print(
        f"| {kind} | {mb['layer_bytes']} | {mb['around_bytes']} | {mb['whole_bytes']} | {mb['layers_bytes']} | "
        f"{mb['allowed_bytes']} | {found['seconds']['whole']:.1f} | {found['seconds']['layers']:.1f} | {found['ratio']:.2f} | "
        f"{'yes' if found['same'] else 'NO'} |",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--one", nargs=5, metavar=("MODEL", "WORKSPACE", "SCHEDULE", "N", "LENGTH"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.one:
        model, workspace, schedule, sequences, length = arguments.one
        print(json.dumps(capture(Path(model), Path(workspace), schedule, int(sequences), int(length))))
        return 0
    print(
        "| model | layer MB | around MB | whole MB | by layers MB | allowed MB | whole s | by layers s | ratio | same files |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="outliers-layers-") as place:
        for kind in KINDS:
            figures[kind] = measure(kind, arguments, Path(place))
            tell(kind, figures[kind])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0 if all(found["fits"] and found["same"] for found in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
