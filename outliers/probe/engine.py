"""A loaded model that is read with a change: the pass itself, with hooks, changed weights and layers that are left out.

It knows the model and one batch at a time, nothing of files. Every pass over a batch has the batch's own composition, options
and dtype, so that what is not changed has the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from outliers.capture.forward import pass_options
from outliers.capture.perplexity import Head
from outliers.errors import SiteError
from outliers.model.anatomy import Anatomy
from outliers.probe.changes import Change, WeightAt
from outliers.probe.edits import Edit, Identity, LastPlace, Mean, Pass, Place, Zero, edited
from outliers.probe.formats import Ranges, quantize_edits, smooth_scales
from outliers.probe.observe import Look, observed
from outliers.probe.one_expert import edited_experts
from outliers.probe.readers import Reader
from outliers.probe.sharing import Kept
from outliers.probe.silence import silenced
from outliers.probe.weights import changed_weights, column_magnitudes, quantizing, zeroed_weight
from outliers.spec.formats import parse_format


@dataclass(frozen=True)
class Batch:
    """The sequences of one pass. ids: (sequence, position) int64, as long as the longest; lengths: tokens of each.

    counted: how many of the sequences, the first ones, are measured.
    """

    sequences: range
    ids: torch.Tensor
    lengths: tuple[int, ...]
    counted: int

    @property
    def measured(self) -> range:
        """The sequences that are measured."""
        return self.sequences[: self.counted]

    @property
    def tokens(self) -> int:
        """Tokens that a pass computes, without padding."""
        return sum(self.lengths)


@dataclass
class Engine:
    """The model and its readers. prefix: ids that come before each sequence where a change asks for them. silent_layers: those
    in which a change silences experts; mapped: one expert of each layer in which experts are quantized alone; there a change that
    changes nothing goes through the same hooks."""

    model: Any
    anatomy: Anatomy
    readers: Mapping[Place, Sequence[Reader]]
    prefix: tuple[int, ...] = ()
    held_sites: tuple[str, ...] = ()
    silent_layers: tuple[int, ...] = ()
    mapped: Mapping[int, int] = field(default_factory=dict)
    now: Pass = field(default_factory=Pass)
    _columns: dict[Place, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base: torch.nn.Module = self.model.get_submodule(self.anatomy.backbone)
        found = self.base.get_submodule(self.anatomy.layers)
        if not isinstance(found, torch.nn.ModuleList):
            raise SiteError(f"{self.anatomy.layers} of {type(self.base).__name__} is not a list of layers")
        self.layers: torch.nn.ModuleList = found
        self.head = Head(self.model)

    def forward(self, batch: Batch, *, prefix: bool = False) -> torch.Tensor:
        """The last hidden state of a pass, (sequence, position, hidden), without the positions of a prefix."""
        before = len(self.prefix) if prefix else 0
        ids, lengths = batch.ids, batch.lengths
        if before:
            own = torch.tensor(self.prefix, dtype=ids.dtype, device=ids.device).expand(ids.shape[0], before)
            ids, lengths = torch.cat([own, ids], dim=1), tuple(length + before for length in lengths)
        self.now.sequences, self.now.positions = ids.shape[0], ids.shape[1]
        self.now.kept = before
        with torch.inference_mode():
            output = self.base(input_ids=ids, **pass_options(ids, lengths))
        hidden: torch.Tensor = output[0]
        return hidden[:, before:]

    def looking(self, look: Look) -> contextlib.AbstractContextManager[None]:
        """In the block `look` is shown each site of each layer."""
        return observed(self.readers, look, self.now)

    def run(self, change: Change, batch: Batch, ranges: Ranges, kept: Kept | None) -> torch.Tensor:
        """The last hidden state of a changed pass. kept: outputs of the untouched pass, where layers may be left out."""
        with contextlib.ExitStack() as stack:
            if kept is not None and change.first_layer and not change.prefix:
                stack.enter_context(kept.skipping(change.first_layer))
            stack.enter_context(self._changed(change, ranges))
            return self.forward(batch, prefix=change.prefix)

    @contextlib.contextmanager
    def _changed(self, change: Change, ranges: Ranges) -> Iterator[None]:
        places = self._places(change)
        scales = self._scales(change, places, ranges)
        with contextlib.ExitStack() as stack:
            if change.weights is not None:
                own = {place: self.readers[place] for place in places}
                make = quantizing(parse_format(change.weights), scales)
                stack.enter_context(changed_weights(self.layers, own, make))
            if change.weight is not None:
                stack.enter_context(
                    zeroed_weight(self.module_of(change.weight), change.weight.row, change.weight.column)
                )
            stack.enter_context(self._silenced(change))
            edits = self._edits(change, places, ranges, scales)
            alone = self._alone(change, edits)
            stack.enter_context(edited_experts(self._expert_readers(tuple(alone)), alone, self.now))
            if change.kind != "map" or not change.experts:
                stack.enter_context(edited(self._readers(change, places), edits, self.now))
            yield

    def _alone(self, change: Change, edits: Mapping[Place, Edit]) -> dict[int, tuple[int, Edit]]:
        """Layer -> the expert whose input alone is changed, with its edit."""
        if change.kind == "map":
            return {layer: (expert, edits["mlp_in", layer]) for layer, expert in change.experts}
        if change.kind == "identity":
            return {layer: (expert, Identity()) for layer, expert in self.mapped.items() if layer in change.layers}
        return {}

    def _expert_readers(self, layers: tuple[int, ...]) -> dict[int, Reader]:
        """Layer -> its module of experts, as a reader of mlp_in. Raises SiteError where there is none."""
        found = {}
        for layer in layers:
            own = [reader for reader in self.readers.get(("mlp_in", layer), ()) if reader.is_experts]
            if len(own) != 1:
                raise SiteError(
                    f"layer {layer} has {len(own)} modules of experts that read mlp_in: leave --map-experts out"
                )
            found[layer] = own[0]
        return found

    def _silenced(self, change: Change) -> contextlib.AbstractContextManager[None]:
        own: dict[int, set[int]] = {}
        if change.kind == "identity":
            own = {layer: set() for layer in self.silent_layers if layer in change.layers}
        for layer, expert in change.experts if change.kind != "map" else ():
            own.setdefault(layer, set()).add(expert)
        return silenced(self.expert_modules(tuple(own)), own, self.now)

    def expert_modules(self, layers: tuple[int, ...]) -> dict[int, torch.nn.Module]:
        """Layer -> its module of experts."""
        pattern = self.anatomy.experts or ""
        return {layer: self.base.get_submodule(pattern.replace("*", str(layer))) for layer in layers}

    def _readers(self, change: Change, places: tuple[Place, ...]) -> Mapping[Place, Sequence[Reader]]:
        """The readers that receive a change: all, or the experts alone."""
        if change.kind != "experts":
            return self.readers
        return {place: [reader for reader in self.readers[place] if reader.is_experts] for place in places}

    def _places(self, change: Change) -> tuple[Place, ...]:
        return tuple((site, layer) for layer in change.layers for site in change.sites)

    def _edits(
        self, change: Change, places: tuple[Place, ...], ranges: Ranges, scales: Mapping[Place, torch.Tensor] | None
    ) -> Mapping[Place, Edit]:
        if change.kind == "identity":
            return dict.fromkeys(places, Identity())
        if change.kind == "floor":
            return dict.fromkeys(places, LastPlace(change.features[0]))
        if change.kind == "zero":
            return dict.fromkeys(places, Zero(change.features))
        if change.kind == "mean":
            return {place: Mean(change.features, ranges.means(place, change.features)) for place in places}
        if change.format is not None:
            return quantize_edits(change, places, ranges, self.held_sites, scales)
        return {}

    def _scales(self, change: Change, places: tuple[Place, ...], ranges: Ranges) -> dict[Place, torch.Tensor] | None:
        if change.smooth is None:
            return None
        for place in places:
            if place not in self._columns:
                self._columns[place] = column_magnitudes(self.readers[place]).cpu()
        return {
            place: smooth_scales(ranges.largest(place, change), self._columns[place], change.smooth) for place in places
        }

    def module_of(self, at: WeightAt) -> torch.nn.Module:
        """The linear layer that a weight is in."""
        return self.layers[at.layer].get_submodule(at.module)
