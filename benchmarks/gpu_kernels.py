"""Whether the kernels that count on the device count what the processor's count, and their time a layer: a part of `gpu_capture`.

A version of this project that has no such kernels, or a machine without Triton, leaves the part out and says so. Without a GPU
torch's own operations are compared, which are their reference.
"""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from outliers.corpus.kinds import KINDS
from outliers.counting.summary import Frame

SITES = ("attn_in", "mlp_in", "resid")
FLOATS = 1e-11
"""Float64 moments are added in another order: the largest relative difference that is allowed."""


def measure(
    device: torch.device, hidden: int, positions: int, layers: int, sequences: int, dtype: str
) -> dict[str, Any]:
    """Arrays of a Summary that differ from the processor's, and microseconds a layer of all sites; `left_out` where not."""
    try:
        from outliers.counting.in_pass import device as device_counter
        from outliers.counting.in_pass.counter import BatchMarks, PassShape
        from outliers.counting.in_pass.host import HostCounter

        operations: Any = None
        if device.type == "cuda":
            from outliers.counting.in_pass import triton_ops as operations
    except ImportError as error:
        return {"left_out": f"this version counts nothing in the pass ({error})"}
    frame = Frame(
        "benchmark",
        dtype,
        tuple((site, hidden) for site in SITES),
        layers,
        positions,
        6.0,
        (3.0, 4.5, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0),
        "block",
    )
    shape = PassShape(sequences, positions, positions)
    acts = _activations(hidden, positions, layers, sequences, dtype)
    marks = np.zeros((sequences, len(KINDS), positions), np.bool_)
    batch = BatchMarks(range(sequences), (positions,) * sequences, lambda: marks)

    def counted(counter: Any, where: torch.device, passes: int) -> tuple[Any, float]:
        seconds = []
        with counter:
            for _ in range(passes):
                tensors = [(site, layer, values.to(where)) for (site, layer), values in acts.items()]
                counter.begin(batch)
                _wait(where)
                began = time.perf_counter()
                for site, layer, tensor in tensors:
                    counter.submit((None, site, layer), tensor)
                _wait(where)
                seconds.append(time.perf_counter() - began)
                counter.end()
                counter.take()
            return counter.drain(), min(seconds)

    host, _ = counted(HostCounter(frame, shape), torch.device("cpu"), 1)
    found, _ = counted(device_counter.DeviceCounter(frame, shape, operations=operations), device, 1)
    unlike = differences(host, found)
    _, seconds = counted(device_counter.DeviceCounter(frame, shape, operations=operations), device, 5)
    return {
        "operations": "triton" if operations is not None else "torch",
        "unlike": unlike,
        "equal": not unlike,
        "microseconds_a_layer": 1e6 * seconds / layers,
        "tokens": sequences * positions,
    }


def differences(one: Any, other: Any) -> list[str]:
    """Names of the fields of two Summaries whose arrays differ: integers and selections at all, float64 beyond FLOATS."""
    unlike = []
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        pairs = {"": (mine, theirs)} if not isinstance(mine, dict) else {key: (mine[key], theirs[key]) for key in mine}
        for key, (here, there) in pairs.items():
            if isinstance(here, np.ndarray) and not _alike(here, there):
                unlike.append(f"{field.name} {key}".strip())
    return unlike


def _alike(here: Any, there: Any) -> bool:
    if here.shape != there.shape or here.dtype != there.dtype:
        return False
    if here.dtype == np.float64:
        return bool(np.allclose(here, there, rtol=FLOATS, atol=0, equal_nan=True))
    return bool(here.tobytes() == there.tobytes())


def _activations(
    hidden: int, positions: int, layers: int, sequences: int, dtype: str
) -> dict[tuple[str, int], torch.Tensor]:
    """(site, layer) -> (sequence, position, feature) with large columns, ties, -0, infinities and NaN in them."""
    chance = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(layers):
        for site in SITES:
            values = torch.randn((sequences, positions, hidden), generator=chance)
            values[..., 3] *= 40
            values[:, ::7, 5] = 6.0
            values[:, 1::11, 7] = -0.0
            values[:, 2, 9], values[:, 3, 9], values[:, 4, 9] = float("inf"), float("-inf"), float("nan")
            found[site, layer] = values.to(getattr(torch, dtype))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
