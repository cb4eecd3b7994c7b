"""What of a model's weights still has to come from the hub: files that the hub's own cache on this computer lacks."""

from __future__ import annotations

from outliers.hub.cache import cache_for
from outliers.model.describe import ModelInfo


def download_bytes(info: ModelInfo) -> int:
    """Bytes of weights that are still to be downloaded to this computer, less what a broken download left; 0 for a model
    that is here, or is not from the hub."""
    if info.source.kind != "hub":
        return 0
    return cache_for(info.source.path, info.source.revision).missing_weight_bytes(info.weights.checkpoint_bytes)
