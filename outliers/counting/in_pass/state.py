"""What is counted on one device: totals of all batches, and what of each sequence of the batch is needed once it ends.

Integers are added or compared, so their order does not matter; float sums are added in the order of the positions. Knows
tensors, and how they become the arrays of a Summary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.counting.accumulate import limits_of
from outliers.counting.bits import FORMATS, PATTERNS, bits_to_float
from outliers.counting.in_pass.counter import PassShape
from outliers.counting.kernels.arguments import KEY_SHIFT
from outliers.counting.summary import Frame, SiteTotals, Summary
from outliers.spec import BLOCK

HIGHEST, LOWEST = 2**31 - 1, -(2**31)
KEY_BASE = {"bfloat16": LOWEST, "float16": LOWEST, "float32": 0}
"""A key of 16-bit values takes 32 bits without sign: it is kept less 2^31, which keeps the order."""


class Group(NamedTuple):
    """One layer of the sites that are counted together. tensors: of each site, (sequence, position, feature) int16 or int32 bits.

    lengths: tokens of each sequence that are not padding.
    """

    sites: tuple[str, ...]
    layer: int
    tensors: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """The limits of a frame as the device needs them: plain numbers, and the ladder (K,) int32 on the device."""

    kind: int
    mask: int
    infinity: int
    deciding: int
    deciding_step: int
    legacy: int
    massive: int
    ladder: torch.Tensor

    @classmethod
    def of(cls, frame: Frame, device: torch.device) -> Rules:
        limits = limits_of(frame)
        return cls(
            kind=limits.kind,
            mask=FORMATS[frame.dtype].sign - 1,
            infinity=limits.infinity,
            deciding=limits.deciding,
            deciding_step=frame.deciding_step,
            legacy=limits.legacy,
            massive=limits.massive,
            ladder=torch.tensor(limits.ladder.astype(np.int32), device=device),
        )


@dataclass
class SiteState:
    """The tensors of one site. K magnitudes, L layers, W features, B sequences of a batch, T positions.

    hits, first_hits: (K, L, W) int64. own_hits: (B, L, W) int32, of the batch, at the deciding magnitude. Of captured sites:
    extremes: (2, L, W) int32, least and greatest finite value as `tile._ordered` integers; nonfinite: (L, W) int64; histogram:
    (L, 65536) int64; moments: (4, L, W) float64; tops: (B, L, W) int32, bits of the largest finite magnitudes; keys: (B, T, W)
    int32 or int64, see `arguments.KEY_SHIFT`, less KEY_BASE.
    """

    hits: torch.Tensor
    first_hits: torch.Tensor
    own_hits: torch.Tensor
    extremes: torch.Tensor
    nonfinite: torch.Tensor
    histogram: torch.Tensor
    moments: torch.Tensor
    tops: torch.Tensor
    keys: torch.Tensor


class DeviceState:
    """All sites of a frame on one device."""

    def __init__(self, frame: Frame, shape: PassShape, device: torch.device, begun: Summary) -> None:
        """begun: its float sums go on here."""
        self.frame, self.device, self.rules = frame, device, Rules.of(frame, device)
        self.sites = {site: self._site(site, shape) for site in frame.sites}
        for site in frame.captured:
            self.sites[site].moments.copy_(torch.from_numpy(begun.sites[site].moments))
        self._lengths: tuple[tuple[int, ...], torch.Tensor] | None = None
        self.tokens = np.zeros(frame.num_layers, np.int64)
        """Tokens of each layer that were counted here since the last flush."""
        self.layers: set[int] = set()
        """The layers that were ever counted here."""

    def _site(self, site: str, shape: PassShape) -> SiteState:
        frame, batch, width = self.frame, shape.batch_sequences, self.frame.width(site)
        layers = frame.num_layers
        own = 0 if site == BLOCK else layers  # the block has hits alone
        steps = len(frame.ladder)

        def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, device=self.device)

        key = torch.int64 if frame.dtype == "float32" else torch.int32
        state = SiteState(
            hits=zeros(steps, layers, width),
            first_hits=zeros(steps, layers, width),
            own_hits=zeros(batch, layers, width, dtype=torch.int32),
            extremes=zeros(2, own, width, dtype=torch.int32),
            nonfinite=zeros(own, width),
            histogram=zeros(own, PATTERNS),
            moments=zeros(4, own, width, dtype=torch.float64),
            tops=zeros(batch, own, width, dtype=torch.int32),
            keys=zeros(batch, shape.positions if own else 0, width, dtype=key),
        )
        state.extremes[0], state.extremes[1] = HIGHEST, LOWEST
        state.keys.fill_(KEY_BASE[frame.dtype])
        return state

    def lengths_of(self, lengths: tuple[int, ...]) -> torch.Tensor:
        """The lengths of a batch on the device, (sequence,) int32; made once a batch, for a copy waits for the device."""
        if self._lengths is None or self._lengths[0] != lengths:
            self._lengths = lengths, torch.tensor(lengths, dtype=torch.int32, device=self.device)
        return self._lengths[1]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for state in self.sites.values() for tensor in state.__dict__.values())

    def begin(self) -> None:
        """Forget the sequences of the last batch."""
        for state in self.sites.values():
            state.own_hits.zero_()
            state.tops.zero_()
            state.keys.fill_(KEY_BASE[self.frame.dtype])

    def flush(self, totals: dict[str, SiteTotals]) -> None:
        """Add the integers to the totals of a Summary, and empty them. Waits for the device."""
        for site, state in self.sites.items():
            mine = totals[site]
            mine.hits += state.hits.cpu().numpy()
            mine.first_hits += state.first_hits.cpu().numpy()
            members = [state] if site != BLOCK else [self.sites[name] for name in ("attn_in", "mlp_in")]
            for member in members:
                _widen(mine, member.extremes.cpu().numpy(), self.frame.dtype)
            if site != BLOCK:
                nonfinite = state.nonfinite.cpu().numpy()
                mine.finite += self.tokens[:, None] - nonfinite
                mine.nonfinite += nonfinite.sum(axis=1)
                mine.histogram += state.histogram.cpu().numpy()
                own = sorted(self.layers)
                # a layer is on one device, which keeps its sums from the first batch to the last
                mine.moments[:, own] = state.moments[:, own].cpu().numpy()
        self.tokens[:] = 0
        for state in self.sites.values():
            state.hits.zero_()
            state.first_hits.zero_()
            state.nonfinite.zero_()
            state.histogram.zero_()
            state.extremes[0], state.extremes[1] = HIGHEST, LOWEST


def magnitudes_of(keys: torch.Tensor, dtype: str) -> torch.Tensor:
    """Bits of the magnitudes of keys, int64; same shape."""
    return (keys.long() - KEY_BASE[dtype]) >> KEY_SHIFT


def _widen(totals: SiteTotals, extremes: NDArray[np.int32], dtype: str) -> None:
    """Widen min and max to extremes, (2, L, W), where a value was finite."""
    found = extremes[0] <= extremes[1]
    least, greatest = _values(extremes[0], dtype), _values(extremes[1], dtype)
    np.minimum(totals.min, least, out=totals.min, where=found)
    np.maximum(totals.max, greatest, out=totals.max, where=found)


def _values(ordered: NDArray[np.int32], dtype: str) -> NDArray[np.float32]:
    """The values of `tile._ordered` integers, as `totals._value` has them: -0.0 becomes 0.0."""
    mask = FORMATS[dtype].sign - 1
    magnitude = np.where(ordered >= 0, ordered, (ordered ^ mask) & mask).astype(np.int64)
    values = bits_to_float(magnitude.astype(np.uint32) if dtype == "float32" else magnitude.astype(np.uint16), dtype)
    return np.where((ordered < 0) & (magnitude != 0), -values, values)
