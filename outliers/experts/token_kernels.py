"""A compiled loop over the inputs of experts. numba compiles it once on a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from outliers.compiling import compiler

compiled = compiler([Path(__file__)])


@compiled
def add_token_squares(into, values, experts):
    """into: (expert, column) float64 += values^2 of each token for each of its experts. values: (token, slot or 1, column)
    float32, of which those that are not finite are left out. experts: (token, slot) uint16."""
    for token in range(values.shape[0]):
        for slot in range(experts.shape[1]):
            row = into[experts[token, slot]]
            own = values[token, slot if values.shape[1] > 1 else 0]
            for column in range(own.size):
                x = np.float64(own[column])
                if np.isfinite(x):
                    row[column] += x * x
