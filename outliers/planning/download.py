"""What of a model's weights still has to come from the hub, and how much of it lies on the disk at once."""

from __future__ import annotations

from outliers.hub.cache import cache_for
from outliers.model.describe import ModelInfo
from outliers.study.demand import Demand

SHARD_BYTES = 5_000_000_000
"""A file of weights of the hub: transformers' and the hub's own tools long cut at 5 GB (`max_shard_size`). Assumed: the index,
which tells, is fetched with the weights."""


def download_bytes(info: ModelInfo) -> int:
    """Bytes of weights that are still to be downloaded to this computer, less what a broken download left; 0 for a model
    that is here, or is not from the hub."""
    if info.source.kind != "hub":
        return 0
    return cache_for(info.source.path, info.source.revision).missing_weight_bytes(info.weights.checkpoint_bytes)


def held_bytes(demand: Demand, weights: int) -> int:
    """Of `weights` bytes to fetch, those that are on the disk at once: all, or with --no-keep-weights a few files.

    These are the two with the embedding and the head, and those of one layer, which may begin in one file and end in
    another: a layer that is loaded needs none any more.
    """
    if not demand.spec.compute.no_keep_weights:
        return weights
    sizes = demand.model.weights
    layer = max(sizes.layer_bytes) * sizes.checkpoint_bytes // sizes.memory_bytes
    return min(weights, (2 + layer // SHARD_BYTES + 2) * SHARD_BYTES)
