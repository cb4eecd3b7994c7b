"""A Format as the codes and float32 constants that the compiled loops take. Knows names and numbers, no captures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outliers.quantization.emulate import FLOAT32_EPS, INT_HALF, MX_ROUND, rotation_factor
from outliers.quantization.kernels import rules as kernels
from outliers.quantization.kernels.tile import add_errors
from outliers.spec.formats import Format

_KINDS = {
    "int8": kernels.INT8,
    "int4": kernels.INT4,
    "fp8": kernels.FP8,
    "mxfp8": kernels.MXFP8,
    "mxfp4": kernels.MXFP4,
    "nvfp4": kernels.NVFP4,
}
_SCOPES = {"token": kernels.BY_TOKEN, "tensor": kernels.BY_TENSOR, "channel": kernels.BY_CHANNEL}


def padded(width: int) -> int:
    """Length of a row of the loops, for a site of `width` features."""
    return -(-width // kernels.PADDING) * kernels.PADDING


@dataclass(frozen=True)
class Rule:
    """One format at one site and layer, ready for the loops.

    amax: of a static format of a tensor, else 0. channel: (padded feature,) float32, the scales of int8_channel, else empty.
    """

    kind: int
    scope: int
    amax: np.float32
    channel: NDArray[np.float32]
    added: np.int32
    block: int
    factor: np.float32

    @classmethod
    def of(cls, fmt: Format, width: int, amax: NDArray[np.float32] | None) -> Rule:
        """amax: (feature,) float32, the largest magnitudes of the corpus, for static formats; a tensor's is their largest."""
        kind, _, scope = fmt.base.partition("_")
        channel = np.zeros(0, np.float32)
        overall = np.float32(0)
        if fmt.is_static:
            if amax is None:
                raise ValueError(f"{fmt.name} is static and was given no range")
            if scope == "channel":
                found = amax.astype(np.float32) / np.float32(INT_HALF[kind] - 0.5)
                channel = np.full(padded(width), FLOAT32_EPS, np.float32)
                channel[:width] = np.where(found == 0, np.float32(FLOAT32_EPS), found)
            else:
                overall = np.float32(amax.max(initial=0.0))
        return cls(
            kind=_KINDS[kind],
            scope=_SCOPES.get(scope, kernels.BY_GROUP),
            amax=overall,
            channel=channel,
            added=np.int32(MX_ROUND.get(scope, 0)),
            block=fmt.rotation,
            factor=np.float32(rotation_factor(fmt.rotation) if fmt.rotation else 1.0),
        )

    def quantized(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """One padded row after quantizing and dequantizing, without the rotation."""
        out, spare = np.empty_like(row), np.empty_like(row)
        kernels.quantize_row(row, out, spare, self.kind, self.scope, self.amax, self.channel, self.added)
        return out

    def add_errors(
        self,
        values: NDArray[np.float32],
        good: NDArray[np.bool_],
        held: NDArray[np.float32],
        width: int,
        scratch: NDArray[np.float32],
        errors: NDArray[np.float64],
    ) -> None:
        """Add a tile's squared errors to `errors`, see `kernels.tile.add_errors`."""
        rule = (self.kind, self.scope, self.amax, self.channel, self.added, self.block, self.factor)
        add_errors(values, good, held, width, rule, scratch, errors)
