"""The ready-made sweeps, planned as a person would: hub, catalogs and home are the test's own, and nothing is rented.

Run as a process with that home: `python -m tests.support.sweep_hub FILE...` enables the clouds and prints each plan as JSON.
"""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

from tests.support.hub_server import Repo, commit_id
from tests.support.sky_catalogs import CSVS, write_catalogs

CONFIGS = Path(__file__).parent / "configs"
DENSE = {
    # hidden, intermediate, layers, heads, and whether the head is the embedding: from the published config.json of each
    "Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen3-14B": (5120, 17408, 40, 40, False),
}
MORE = {
    # as RunPod's own: GB where MiB is said
    "runpod": [
        ("1x_L40_SECURE", "L40", 1, 16, 125, 48, 0.99, 0.5, "US", "US-TX-1", ""),
        ("4x_L40_SECURE", "L40", 4, 64, 500, 48, 3.96, 2.0, "US", "US-TX-1", ""),
        ("4x_A100-80GB_SECURE", "A100-80GB", 4, 32, 640, 80, 6.56, 4.0, "US", "US-TX-1", ""),
        ("2x_A100-80GB_SECURE", "A100-80GB", 2, 32, 320, 80, 3.28, 2.0, "US", "US-TX-1", ""),
        ("1x_A100-80GB_SECURE", "A100-80GB", 1, 16, 160, 80, 1.64, 1.0, "US", "US-TX-1", ""),
    ],
}


def dense_config(name: str) -> bytes:
    hidden, intermediate, layers, heads, tied = DENSE[name]
    return json.dumps(
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden, "head_dim": 128,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
            "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "hidden_act": "silu", "rope_theta": 1000000,
        }
    ).encode()  # fmt: skip


def published(name: str) -> bytes:
    """The config of a model of the ready-made sweeps."""
    short = name.split("/")[1]
    if short in DENSE:
        return dense_config(short)
    (path,) = [path for path in CONFIGS.glob("*.json") if short.lower().startswith(path.stem)]
    return path.read_bytes()


def repo_of(name: str) -> Repo:
    """A model on the hub: its config, and weights of one number, which tell the dtype where the config does not."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(2)
    files = {"config.json": published(name), "model.safetensors": weights}
    commit = commit_id(name)
    return Repo("models", name, {commit: files}, {"main": commit})


def write_home(home: Path) -> None:
    """Catalogs with a machine for each study."""
    write_catalogs(home)
    for cloud, rows in MORE.items():
        known = {row[0] for row in CSVS[cloud]}
        with (home / ".sky" / "catalogs" / "v8" / cloud / "vms.csv").open("a", newline="") as file:
            for kind, gpu, count, cpus, gib, gb, *rest in rows:
                if kind in known:
                    continue
                card = {"Name": gpu, "Manufacturer": "NVIDIA", "Count": count, "MemoryInfo": {"SizeInMiB": gb}}
                info = str({"Gpus": [card], "TotalGpuMemoryInMiB": gb})
                csv.writer(file).writerow((kind, gpu, count, cpus, gib, info, *rest)[:10])


def main(files: list[str]) -> None:
    from flows.cli.command import main as outliers
    from outliers.machines import catalog
    from tests.support.sky_probe import enable_clouds

    enable_clouds(catalog.import_sky())
    for file in files:
        outliers(["sweep", file, "--dry-run", "--json"])


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
