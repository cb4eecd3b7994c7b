"""Sums of squares of what each expert's first projection gets: the stored `mlp_in` of the tokens that reach it.

Where an input is multiplied by its weight before the expert (Llama4), the product is rounded to the model's dtype, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.experts.token_kernels import add_token_squares
from outliers.store.chunks import ChunkFiles
from outliers.study.layout import Layout

SITE = "mlp_in"


def add_inputs(
    squares: NDArray[np.float64],
    files: ChunkFiles,
    layout: Layout,
    sequence: int,
    crcs: dict[str, NDArray[Any]],
    table: dict[str, NDArray[Any]],
) -> None:
    """Add one sequence to `squares`, (L, E, H) float64: non-finite values are left out. Raises CorruptCapture.

    crcs: of its chunks. table: its routing table without padding.
    """
    shapes = layout.experts
    if shapes is None:
        raise ValueError("the capture holds no experts")
    site = layout.aliases.get(SITE, SITE)
    length, chunks = table["expert"].shape[1], layout.chunks_of(table["expert"].shape[1])
    for index, layer in enumerate(shapes.layers):
        at = layout.layers.index(layer)
        for chunk in range(chunks):
            stored = files.read(site, at, sequence, chunk, int(crcs[site][at * chunks + chunk]))
            start = layout.span(chunk).start
            values = _numbers(stored[: length - start], layout.dtype)[:, None]  # (token, 1, column)
            stop = start + values.shape[0]
            experts = np.ascontiguousarray(table["expert"][index, start:stop, : shapes.slots])
            if shapes.applied:
                weights = table["expert_weight"][index, start:stop, : shapes.slots, None]
                values = _rounded(values * weights, layout.dtype)
            add_token_squares(squares[index], np.ascontiguousarray(values), experts)


def _numbers(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32, which has those of every dtype exactly."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """float32 products rounded to the model's dtype, ties to even, as torch rounds them."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        even = ((bits >> 16) & 1) + 0x7FFF
        return ((bits + even) & np.uint32(0xFFFF0000)).view(np.float32)
    return values
