"""Models for `gpu_capture`: random ones made by a config alone, and the devices that a model is put on."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from outliers.capture.load import load_model
from outliers.model.describe import ModelInfo
from outliers.workspace import Workspace


def random_model(arguments: argparse.Namespace, folder: Path) -> str:
    """Save a model of random weights, made by its config alone, on the device that is measured; returns its folder."""
    import transformers

    hidden = arguments.hidden
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": 32_000 if hidden >= 1024 else 256,
        "max_position_embeddings": max(2048, arguments.length),
    }
    experts = {"num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": hidden * 3 // 8, "head_dim": 64}
    config = (
        transformers.LlamaConfig(**sizes)
        if arguments.family == "llama"
        else transformers.Qwen3MoeConfig(**sizes, **experts)
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    del model
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return str(folder)


def placed(info: ModelInfo, workspace: Workspace, devices: list[torch.device]) -> torch.nn.Module:
    """The model on its device, or its layers dealt to several."""
    if len(devices) == 1:
        return load_model(info, workspace, str(devices[0]))
    from accelerate import dispatch_model

    model = load_model(info, workspace, "cpu")
    # on a CPU both halves are in one place: the hooks that move tensors between them are there all the same
    return dispatch_model(model, split(model, info, devices), main_device=str(devices[0]), force_hooks=True)


def split(model: torch.nn.Module, info: ModelInfo, devices: list[torch.device]) -> dict[str, str]:
    """Module -> device: equal runs of layers; the final norm goes with the last, all else with the first."""
    backbone, layers = info.anatomy.backbone, info.anatomy.layers
    places = {
        f"{backbone}.{layers}.{number}": str(devices[number * len(devices) // info.num_layers])
        for number in range(info.num_layers)
    }
    for name, _ in model.get_submodule(backbone).named_children():
        if name != layers:
            places[f"{backbone}.{name}"] = str(devices[-1] if name.endswith("norm") else devices[0])
    outside = [name for name, _ in model.named_children() if not f"{backbone}.".startswith(f"{name}.")]
    return places | dict.fromkeys(outside, str(devices[0]))


def placements(arguments: argparse.Namespace) -> list[list[torch.device]]:
    """The devices of each measurement: one, and two where there are two, or as many as --split says."""
    there = torch.cuda.device_count() if arguments.device == "cuda" else 1
    counts = [arguments.split] if arguments.split else [1, 2][:there]
    if arguments.device == "cpu":
        return [[torch.device("cpu")] * count for count in counts]
    return [[torch.device("cuda", index) for index in range(count)] for count in counts]


def refusal(arguments: argparse.Namespace) -> str | None:
    """Why this machine can't run what was asked, or None."""
    if arguments.device == "cpu":
        return None
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
        return (
            "this needs a machine with an NVIDIA GPU, its driver, and a torch for CUDA; "
            f"torch {torch.__version__} here is {built} and sees no GPU. `--device cpu` tries the script itself"
        )
    if arguments.split and arguments.split > torch.cuda.device_count():
        return f"--split {arguments.split} needs as many GPUs, {torch.cuda.device_count()} are here"
    return None
