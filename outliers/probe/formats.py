"""A format at a site: the edit that quantizes what its readers receive, with its range, held features and smoothing.

SmoothQuant (arXiv 2211.10438, equation 4): s_j = max|x_j|^a / max|w_j|^(1 - a), the values divided by s_j before they are
quantized. In a deployed model the weights are multiplied by s_j; here the quantized values are, which has the same effect
where weights are not quantized, and where they are, `weights.quantizing` multiplies, quantizes and divides them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.probe.changes import Change
from outliers.probe.edits import Place
from outliers.probe.findings import OWN, STUDY, Findings
from outliers.probe.statistics import Rotated, Statistics
from outliers.quantization.emulate import emulate
from outliers.spec.formats import Format, parse_format

LEAST_SCALE = 1e-5
"""Least s_j, as SmoothQuant's own program has it (smoothquant/smooth.py)."""


@dataclass(frozen=True)
class Quantize:
    """Quantizes and dequantizes. scale: (feature,) float32, what values are divided by before, and multiplied by after."""

    format: Format
    amax: float | torch.Tensor | None = None
    held: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    routers: bool = False

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        amax = self.amax.to(x.device) if isinstance(self.amax, torch.Tensor) else self.amax
        if self.scale is None:
            return emulate(x, self.format, amax=amax, held=self.held)
        own = self.scale.to(x.device)
        made = emulate((x.float() / own).to(x.dtype), self.format, amax=amax, held=self.held)
        return (made.float() * own).to(x.dtype)


@dataclass(frozen=True)
class Ranges:
    """Ranges and means of a probe. prefer_study: whether what all sequences of the study have is taken where it is known."""

    findings: Findings
    statistics: Statistics
    prefer_study: bool

    def source(self, site: str) -> str:
        """Where means, and ranges of all tokens without rotation, come from."""
        return STUDY if self.prefer_study and site in self.findings.largest else OWN

    def largest(self, place: Place, change: Change, rotation: int = 0, *, held: bool = False) -> NDArray[np.float64]:
        """(feature,): the largest magnitudes at a place, of the tokens that a change's range is made of."""
        site, layer = place
        if change.prefix or not change.first_tokens or rotation or self.source(site) == OWN:
            rotated = Rotated(rotation, held) if rotation else None
            return self.statistics.largest(
                site, layer, first_tokens=change.first_tokens, rotated=rotated, prefix=change.prefix
            )
        return np.asarray(self.findings.largest[site][self.statistics.layers.index(layer)])

    def means(self, place: Place, features: tuple[int, ...]) -> tuple[float, ...]:
        """The mean of each feature at a place."""
        site, layer = place
        row = self.statistics.layers.index(layer)
        own = self.findings.means[site][row] if self.source(site) == STUDY else self.statistics.mean(site, layer)
        return tuple(float(own[feature]) for feature in features)

    def magnitudes(self, sites: tuple[str, ...]) -> NDArray[np.float64]:
        """(feature,): the largest abs(x) over the sites, layers and tokens, of sites of one width."""
        whole = Change("", "identity")
        rows = [self.largest((site, layer), whole) for site in sites for layer in self.statistics.layers]
        return np.asarray(np.stack(rows).max(axis=0))


def range_source(change: Change, ranges: Ranges) -> str | None:
    """Where the static ranges, means or scales of a change come from; None where it has none."""
    static = change.format is not None and parse_format(change.format).is_static
    if not (static or change.smooth is not None or change.kind == "mean"):
        return None
    rotated = change.format is not None and bool(parse_format(change.format).rotation)
    if change.prefix or not change.first_tokens or rotated:
        return OWN
    return STUDY if all(ranges.source(site) == STUDY for site in change.sites) else OWN


def quantize_edits(
    change: Change,
    places: tuple[Place, ...],
    ranges: Ranges,
    held_sites: tuple[str, ...],
    scales: Mapping[Place, torch.Tensor] | None = None,
) -> dict[Place, Quantize]:
    """The edit of each place for a change with a format."""
    form = parse_format(str(change.format))
    return {
        place: Quantize(
            form,
            _amax(form, place, change, ranges, held_sites, None if scales is None else scales[place]),
            _mask(ranges, place, change, held_sites),
            None if scales is None else scales[place],
        )
        for place in places
    }


def _mask(ranges: Ranges, place: Place, change: Change, held_sites: tuple[str, ...]) -> torch.Tensor | None:
    if not change.held or place[0] not in held_sites:
        return None
    mask = torch.zeros(ranges.statistics.mean(*place).size, dtype=torch.bool)
    mask[list(change.held)] = True
    return mask


def _amax(
    form: Format,
    place: Place,
    change: Change,
    ranges: Ranges,
    held_sites: tuple[str, ...],
    scale: torch.Tensor | None,
) -> float | torch.Tensor | None:
    """The range of a static format, of rotated values where it rotates, without held features."""
    if not form.is_static:
        return None
    held = bool(change.held) and place[0] in held_sites
    sizes = np.array(ranges.largest(place, change, form.rotation, held=held))
    if held and not form.rotation:
        sizes[list(change.held)] = 0
    if scale is not None:
        sizes = sizes / scale.double().numpy()
    if form.base == "int8_channel":
        return torch.from_numpy(sizes).float()
    return float(sizes.max())


def smooth_scales(largest: NDArray[np.float64], weights: torch.Tensor, strength: float) -> torch.Tensor:
    """(feature,) float32: SmoothQuant's s_j, from the largest magnitudes of a site's features and of the weights' columns."""
    own = torch.from_numpy(largest).float()
    columns = weights.float().cpu().clamp(min=LEAST_SCALE)
    return (own.pow(strength) / columns.pow(1 - strength)).clamp(min=LEAST_SCALE)
