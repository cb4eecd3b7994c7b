"""Captures of tiny mixtures of experts, and what they hold."""

from __future__ import annotations

import numpy as np
import torch
import zarr

from outliers.experts.sums_files import load_sums
from outliers.experts.table import FIELDS
from outliers.store.fingerprint import layout_from, read_fingerprint
from tests.support import expert_oracle as oracle
from tests.support import tiny

BATCH = {"batch_sequences": 2, "sites": ("attn_in", "mlp_in")}


def model_of(folder, family, dtype="float32"):
    """A saved tiny model whose tokens are routed apart."""
    made = oracle.build(family, "eager", getattr(torch, dtype))
    made.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return str(folder)


def arrays_of(workspace, study):
    group = zarr.open_group(workspace.capture(study.capture_id) / "activations.zarr", mode="r")
    return {name: group[name][:] for name in FIELDS if name in group}, group["lengths"][:], group["token_ids"][:]


def layout_in(workspace, study):
    return layout_from(read_fingerprint(workspace.capture(study.capture_id)))


def sums_in(workspace, study):
    layout = layout_in(workspace, study)
    return load_sums(workspace.capture(study.capture_id), layout.experts, range(layout.num_sequences))


def same_arrays(one, other):
    for name, value in one.__dict__.items():
        if isinstance(value, np.ndarray):
            assert value.tobytes() == getattr(other, name).tobytes(), name
