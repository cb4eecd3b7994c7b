"""Scales of SmoothQuant: for each projection the largest abs of every column of its input, over the corpus.

    {"model.layers.0.self_attn.q_proj": float32 (W), ...}

Source: smoothquant/calibration.py of the paper's own library (Xiao et al. 2022, arXiv 2211.10438), which saves such a dict
with torch.save. Safetensors holds the same without pickle, and is written unless the file is called .pt.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from outliers.export.source import SITES, Study
from outliers.model.readers import Reader

NEEDED = ("attn_in", "mlp_in")
"""What smoothing reads: the inputs that a norm gives (smoothquant/smooth.py)."""


def act_scales(study: Study) -> tuple[dict[str, NDArray[np.float32]], tuple[Reader, ...]]:
    """The scales by module, and the modules that have none because their input was not captured.

    Raises BadInput where an input that smoothing reads was not.
    """
    more = tuple(site for site in SITES[2:] if all(study.has(site, layer) for layer in _layers(study, site)))
    study.check_sites((*NEEDED, *more), "act-scales")
    scales = {
        reader.name: study.columns(reader.site, reader.layer).magnitude
        for reader in study.readers
        if reader.kind == "projection" and reader.site in (*NEEDED, *more)
    }
    return scales, tuple(reader for reader in study.readers if reader.name not in scales)


def _layers(study: Study, site: str) -> set[int]:
    return {reader.layer for reader in study.readers if reader.site == site} or {-1}


def safetensors_bytes(arrays: dict[str, NDArray[np.float32]]) -> bytes:
    """A safetensors file of arrays."""
    from safetensors.numpy import save

    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def pickle_bytes(arrays: dict[str, NDArray[np.float32]]) -> bytes:
    """What torch.save makes of a dict of tensors: a pickle, which whoever loads it must trust."""
    import torch

    out = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, out)
    return out.getvalue()
