"""What of a model's weights still has to come from the hub: files that the hub's own cache on this computer lacks."""

from __future__ import annotations

import json
import os
from pathlib import Path

from outliers.files.atomic import size_of
from outliers.model.describe import ModelInfo


def download_bytes(info: ModelInfo) -> int:
    """Bytes of weights that are still to be downloaded to this computer, less what a broken download left; 0 for a model
    that is here, or is not from the hub."""
    if info.source.kind != "hub":
        return 0
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=info.source.path, repo_type="model")
    snapshot = cache / "snapshots" / info.source.revision
    index = snapshot / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    if all((snapshot / name).exists() for name in names):
        return 0
    # a file that is still being written has another name
    pieces = (*snapshot.glob("*.safetensors"), *cache.glob("blobs/*.incomplete"))
    return max(0, info.weights.checkpoint_bytes - sum(map(size_of, pieces)))


def cache_is_elsewhere() -> bool:
    """Whether an environment variable moves the hub's cache, likely to another disk than the workspace's. The download
    checks that disk."""
    return bool(os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE"))
