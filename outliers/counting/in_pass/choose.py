"""Which way counts on a device: the compiled loops on a processor, Triton's kernels on a GPU, torch's operators elsewhere."""

from __future__ import annotations

import importlib.util
import logging

import torch

from outliers.counting.in_pass.counter import Counter, PassShape
from outliers.counting.in_pass.device import DeviceCounter
from outliers.counting.in_pass.host import HostCounter
from outliers.counting.summary import Frame, Summary

log = logging.getLogger(__name__)


def open_counter(
    frame: Frame, shape: PassShape, device: str, *, begun: Summary | None = None, workers: int | None = None
) -> Counter:
    """The counter of a model whose ids go to `device`. begun: a Summary to go on from. workers: threads, on a processor."""
    kind = torch.device(device).type
    if kind == "cpu":
        return HostCounter(frame, shape, begun=begun, workers=workers)
    if kind == "cuda" and importlib.util.find_spec("triton") is not None:
        from outliers.counting.in_pass import triton_ops

        return DeviceCounter(frame, shape, begun=begun, operations=triton_ops)
    log.warning(
        "there are no kernels for %s here (pip install 'outlier-features[kernels]' on Linux with an NVIDIA GPU): torch's own "
        "operators count, in about 150 launches a layer",
        kind,
    )
    return DeviceCounter(frame, shape, begun=begun)
