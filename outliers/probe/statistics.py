"""What the untouched pass shows of each site over the sequences that a probe reads, before anything is changed.

For each (site, layer, feature): sum and sum of squares in float64, the largest magnitude with and without first tokens, and
the same of rotated values where a static format rotates. For each layer with an MLP the largest value that its second
projection gives, with the weight that makes most of it (super weights, arXiv 2411.07191). Padding is left out.
A snapshot on disk holds the sums and the sequences that they are of, so that a killed probe goes on after them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.files.atomic import write_atomic
from outliers.files.sealed import read_sealed, write_sealed
from outliers.probe.edits import Place
from outliers.quantization.emulate import rotate

ALL, REST = "all", "rest"
"""Ranges of all tokens, and of all but the first of each sequence."""
FILE, SEAL = "statistics.npz", "statistics.json"
LOAD = "experts.tokens"
"""The array (layer, expert) of the tokens that reach each expert; there where experts are silenced."""
SPIKE = ("value", "sequence", "position", "row", "column", "input")
"""Columns of a layer's largest output of its MLP. Row and column are those of the projection's weight."""


@dataclass(frozen=True)
class Rotated:
    """A range that is kept of rotated values: its width of blocks, and whether the held features are left out of it."""

    width: int
    held: bool

    @property
    def key(self) -> str:
        """The name of its arrays: `had64`, or `had64.held`."""
        return f"had{self.width}{'.held' if self.held else ''}"


@dataclass
class Statistics:
    """Sums and maxima. arrays: `SITE.sum`, `SITE.square`, `SITE.all`, `SITE.rest`, `SITE.had64.all`, ...: (layer, feature).

    layers: their own numbers, in the order of the arrays' first axis. prefixed: the same maxima where a prefix comes before
    each sequence, under `prefix.SITE.all`. spikes: (layer, SPIKE) float64, NaN where a layer has no MLP.
    """

    layers: tuple[int, ...]
    arrays: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    spikes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, len(SPIKE))))
    sequences: int = 0
    tokens: int = 0

    @classmethod
    def zero(cls, layers: tuple[int, ...]) -> Statistics:
        """Of no sequence."""
        return cls(layers, spikes=np.full((len(layers), len(SPIKE)), np.nan))

    def mean(self, site: str, layer: int) -> NDArray[np.float64]:
        """(feature,): mean over the tokens."""
        return np.asarray(self.arrays[f"{site}.sum"][self.layers.index(layer)] / max(1, self.tokens))

    def mean_square(self, site: str, layer: int) -> NDArray[np.float64]:
        """(feature,): mean of squares over the tokens."""
        return np.asarray(self.arrays[f"{site}.square"][self.layers.index(layer)] / max(1, self.tokens))

    def largest(
        self, site: str, layer: int, *, first_tokens: bool = True, rotated: Rotated | None = None, prefix: bool = False
    ) -> NDArray[np.float64]:
        """(feature,): the largest magnitude."""
        which = ALL if first_tokens else REST
        key = f"{'prefix.' if prefix else ''}{site}.{f'{rotated.key}.' if rotated else ''}{which}"
        return np.asarray(self.arrays[key][self.layers.index(layer)])


class Collector:
    """Adds the tensors of a batch to a Statistics. `begin` names the batch; the object is a `Look` for `observed`."""

    def __init__(
        self, found: Statistics, rotated: Sequence[Rotated], held: dict[str, tuple[int, ...]], *, prefix: int = 0
    ) -> None:
        """prefix: positions at the begin of each sequence that are left out, and that another Statistics has not."""
        self.found, self.rotated, self.held, self.prefix = found, tuple(rotated), held, prefix
        self._lengths: tuple[int, ...] = ()

    def begin(self, lengths: tuple[int, ...]) -> None:
        """lengths: counted tokens of the sequences of the next batch, 0 for one that is not counted."""
        self._lengths = lengths
        if not self.prefix:
            self.found.sequences += sum(length > 0 for length in lengths)
            self.found.tokens += sum(lengths)

    def __call__(self, place: Place, x: torch.Tensor) -> None:
        site, layer = place
        row = self.found.layers.index(layer)
        for number, length in enumerate(self._lengths):
            if not length:
                continue
            own = x[number, self.prefix : self.prefix + length]  # (token, feature)
            if self.prefix:
                self._reach(f"prefix.{site}", row, own)
            else:
                wide = own.double()
                self._add(f"{site}.sum", row, wide.sum(0))
                self._add(f"{site}.square", row, wide.square().sum(0))
                self._reach(site, row, own)
            for way in self.rotated:
                kept = own.float()
                if way.held and self.held.get(site):
                    kept = kept.index_fill(-1, torch.tensor(self.held[site], device=own.device), 0)
                name = f"{'prefix.' if self.prefix else ''}{site}.{way.key}"
                self._reach(name, row, rotate(kept, way.width))

    def _reach(self, name: str, row: int, own: torch.Tensor) -> None:
        sizes = own.abs()
        self._largest(f"{name}.{ALL}", row, sizes.amax(0))
        if self.prefix or own.shape[0] < 2:
            self._largest(f"{name}.{REST}", row, sizes.amax(0) if self.prefix else torch.zeros_like(sizes[0]))
        else:
            self._largest(f"{name}.{REST}", row, sizes[1:].amax(0))

    def _array(self, name: str, width: int) -> NDArray[np.float64]:
        return self.found.arrays.setdefault(name, np.zeros((len(self.found.layers), width)))

    def _add(self, name: str, row: int, values: torch.Tensor) -> None:
        self._array(name, values.shape[0])[row] += values.cpu().numpy()

    def _largest(self, name: str, row: int, values: torch.Tensor) -> None:
        own = self._array(name, values.shape[0])
        own[row] = np.maximum(own[row], values.double().cpu().numpy())


def watch_spike(
    found: Statistics,
    layer: int,
    module: torch.nn.Module,
    transposed: bool,
    batch: Sequence[int],
    lengths: Sequence[int],
) -> Any:
    """A forward hook's handle that notes a layer's largest output of its MLP's second projection.

    batch: numbers of the sequences in the pass; lengths: their counted tokens.
    """

    def after(projection: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        rows = output.reshape(len(batch), -1, output.shape[-1])
        inputs = args[0].reshape(len(batch), -1, args[0].shape[-1])
        at = found.layers.index(layer)
        for number, (sequence, length) in enumerate(zip(batch, lengths, strict=True)):
            if not length:
                continue
            sizes = rows[number, :length].abs()
            flat = int(sizes.argmax())
            position, row = flat // sizes.shape[1], flat % sizes.shape[1]
            value = float(rows[number, position, row])
            if not np.isnan(found.spikes[at, 0]) and abs(value) <= abs(found.spikes[at, 0]):
                continue
            weight = projection.weight[:, row] if transposed else projection.weight[row]
            column = int((weight.double() * inputs[number, position].double()).abs().argmax())
            found.spikes[at] = (value, sequence, position, row, column, float(inputs[number, position, column]))

    return module.register_forward_hook(after)


def save(folder: Path, found: Statistics) -> None:
    """Write a snapshot: the numbers, and last what they are of with their checksum."""
    buffer = io.BytesIO()
    np.savez(buffer, spikes=found.spikes, **found.arrays)  # type: ignore[arg-type]  # numpy's `allow_pickle`
    data = buffer.getvalue()
    write_atomic(folder / FILE, data)
    write_sealed(
        folder / SEAL,
        {
            "sha256": hashlib.sha256(data).hexdigest(),
            "layers": list(found.layers),
            "sequences": found.sequences,
            "tokens": found.tokens,
        },
    )


def load(folder: Path, layers: tuple[int, ...]) -> Statistics:
    """The snapshot in a folder; of no sequence where there is none, or where it is not what was written."""
    sealed = read_sealed(folder / SEAL)
    if sealed is None or sealed["layers"] != list(layers):
        return Statistics.zero(layers)
    try:
        data = (folder / FILE).read_bytes()
    except OSError:
        return Statistics.zero(layers)
    if hashlib.sha256(data).hexdigest() != sealed["sha256"]:
        return Statistics.zero(layers)
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    spikes = arrays.pop("spikes")
    return Statistics(layers, arrays, spikes, int(sealed["sequences"]), int(sealed["tokens"]))
