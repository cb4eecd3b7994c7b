"""Names of files: those of a model's repository, and the hub's cache on a disk.

It opens no file and makes no request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights in one file, or the index of their shards: transformers reads no other name."""
WEIGHTS_SUFFIX = ".safetensors"
SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Of the config, the tokenizer and the chat template."""
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def adapter_files(names: Iterable[str]) -> list[str]:
    """Those of the names that belong to a LoRA adapter, sorted."""
    return sorted(name for name in names if name == "adapter_config.json" or name.startswith("adapter_model."))


def cache_folder_name(repo_id: str) -> str:
    """The folder of a model in the hub's cache: `models--Qwen--Qwen3-0.6B`."""
    return f"models--{repo_id.replace('/', '--')}"
