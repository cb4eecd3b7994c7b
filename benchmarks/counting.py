"""The same statistics by numpy and by torch, and the ways that analysis is compared with.

What `by_numpy` and `by_torch` give of two arrays is what the project's kernels give: extremes, moments, histogram, hits of
each site and of both at every magnitude of the ladder, and the running maxima over the layers. They are written as one would
write them with each library, tile by tile, so that what a pass leaves in the cache the next one finds there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

LADDER = (3.0, 4.5, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0)
TILE = 64
Bits = NDArray[np.uint16]


def singles(bits: Bits) -> NDArray[np.float32]:
    """bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def absmax(bits: Bits) -> float:
    """numpy's abs().max() of bfloat16."""
    return float(np.abs(singles(bits)).max())


def by_numpy(one: Bits, other: Bits, peaks: NDArray[np.uint16]) -> dict[str, Any]:
    """All statistics of a chunk at both sites; peaks: (3, position, feature), raised."""
    limits = [int(np.float32(step).view(np.uint32) >> 16) for step in LADDER]
    width = one.shape[1]
    found: dict[str, Any] = {
        "max": np.full((2, width), -np.inf, np.float32),
        "min": np.full((2, width), np.inf, np.float32),
        "moments": np.zeros((2, 4, width)),
        "histogram": np.zeros((2, 65536), np.int64),
        "hits": np.zeros((3, len(LADDER), width), np.int64),
    }
    for at in range(0, one.shape[0], TILE):
        magnitudes = []
        for site, bits in enumerate((one, other)):
            tile = bits[at : at + TILE]
            single = singles(tile)
            np.maximum(found["max"][site], single.max(axis=0), out=found["max"][site])
            np.minimum(found["min"][site], single.min(axis=0), out=found["min"][site])
            double = single.astype(np.float64)
            square = double * double
            for power, total in enumerate((double, square, square * double, square * square)):
                found["moments"][site, power] += total.sum(axis=0)
            found["histogram"][site] += np.bincount(tile.ravel(), minlength=65536)
            magnitudes.append(tile & np.uint16(0x7FFF))
        magnitudes.append(np.maximum(*magnitudes))
        for site, magnitude in enumerate(magnitudes):
            top = int(magnitude.max())
            for step, limit in enumerate(limits):
                if top < limit:
                    break
                found["hits"][site, step] += np.count_nonzero(magnitude >= limit, axis=0)
            if top >= limits[0]:
                peak = peaks[site, at : at + TILE]
                np.maximum(peak, magnitude, out=peak)
    return found


def by_torch(one: Bits, other: Bits, peaks: torch.Tensor) -> dict[str, Any]:
    """The same with torch's operators."""
    width = one.shape[1]
    found: dict[str, Any] = {
        "max": torch.full((2, width), -torch.inf),
        "min": torch.full((2, width), torch.inf),
        "moments": torch.zeros((2, 4, width), dtype=torch.float64),
        "histogram": torch.zeros((2, 65536), dtype=torch.int64),
        "hits": torch.zeros((3, len(LADDER), width), dtype=torch.int64),
    }
    stored = [torch.from_numpy(bits.view(np.int16)) for bits in (one, other)]
    for at in range(0, one.shape[0], TILE):
        magnitudes = []
        for site, bits in enumerate(stored):
            tile = bits[at : at + TILE]
            single = tile.view(torch.bfloat16).float()
            found["max"][site] = torch.maximum(found["max"][site], single.amax(0))
            found["min"][site] = torch.minimum(found["min"][site], single.amin(0))
            double = single.double()
            square = double * double
            for power, total in enumerate((double, square, square * double, square * square)):
                found["moments"][site, power] += total.sum(0)
            found["histogram"][site] += torch.bincount((tile.int() & 0xFFFF).flatten(), minlength=65536)
            magnitudes.append(single.abs())
        magnitudes.append(torch.maximum(*magnitudes))
        for site, magnitude in enumerate(magnitudes):
            top = float(magnitude.max())
            for step, limit in enumerate(LADDER):
                if top < limit:
                    break
                found["hits"][site, step] += (magnitude >= limit).sum(0)
            if top >= LADDER[0]:
                peak = peaks[site, at : at + TILE]
                torch.maximum(peak, magnitude, out=peak)
    return found


def earlier(sequences: Iterable[list[tuple[int, Bits]]]) -> dict[int, list[dict[int, dict[str, Any]]]]:
    """The earlier pipeline's way: everything as float32 in memory, and a Python loop over every outlier.

    sequences: for each, (hook, (position, feature) bits) of every hook. Returns features by sequence, with the hooks and
    positions that they were seen at and their extremes.
    """
    loaded = [
        [(hook, torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()) for hook, bits in hooks]
        for hooks in sequences
    ]
    found: dict[int, list[dict[int, dict[str, Any]]]] = {}
    for number, hooks in enumerate(loaded):
        features: dict[int, dict[str, Any]] = {}
        for hook, values in hooks:
            positions, columns = torch.where(values.abs() >= 6.0)
            for position, column in zip(positions, columns, strict=True):
                value = values[position, column].item()
                entry = features.setdefault(
                    column.item(),
                    {"layers": set(), "positions": set(), "count": 0, "max": -torch.inf, "min": torch.inf},
                )
                entry["layers"].add(hook)
                entry["positions"].add(position.item())
                entry["count"] += 1
                entry["max"] = max(entry["max"], value)
                entry["min"] = min(entry["min"], value)
        found[number] = [features]
    return found
