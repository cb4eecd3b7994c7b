"""A made-up mixture of experts: what every token gave in every slot, and the ExpertTotals of it, by loops over tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from outliers.experts.sums import LADDER, ExpertSums
from outliers.experts.table import ExpertShapes
from outliers.experts.totals import OUTPUT, OUTPUTS_KEPT, ExpertTotals

STUDY = "5" * 16


@dataclass
class World:
    """(layer, sequence, position, slot, ...): experts as numbers of 0 to A, weights, inputs of the second projection, outputs.

    The shared experts take the last slots. margins: (layer, sequence, position) float32. kinds: (3, sequence, position) bool.
    """

    shapes: ExpertShapes
    lengths: np.ndarray
    expert: np.ndarray
    weight: np.ndarray
    down_in: np.ndarray
    output: np.ndarray
    margins: np.ndarray
    kinds: np.ndarray

    def slots(self):
        """(layer index, sequence, position, slot) of everything that a token gave, in order."""
        for layer in range(len(self.shapes.layers)):
            for sequence, length in enumerate(self.lengths.tolist()):
                for position in range(length):
                    for slot in range(self.shapes.all_slots):
                        yield layer, sequence, position, slot


def world(
    seed=0, layers=(0, 2), experts=5, slots=2, shared=1, width=3, hidden=6, lengths=(7, 4, 9), skew=1.0, values=None,
    applied=False,
):  # fmt: skip
    """Random routing with a taste: expert e is chosen about (e + 1) ** -skew as often. values: a function of (rng, shape)."""
    random = np.random.default_rng(seed)
    values = values or (lambda rng, shape: rng.normal(0, 4, shape))
    shapes = ExpertShapes(tuple(layers), experts, slots, width, (width,) * shared, hidden, applied=applied)
    size = (len(layers), len(lengths), max(lengths))
    taste = (np.arange(experts) + 1.0) ** -skew
    expert = np.zeros((*size, shapes.all_slots), np.int64)
    for at in np.ndindex(*size):
        expert[(*at, slice(0, slots))] = random.choice(experts, slots, replace=False, p=taste / taste.sum())
        expert[(*at, slice(slots, None))] = np.arange(experts, experts + shared)
    weight = random.uniform(0, 1, expert.shape).astype(np.float32)
    weight[..., slots:] = 1
    kinds = random.random((3, *size[1:])) < 0.3
    kinds[0] = np.arange(max(lengths)) == 0
    return World(
        shapes,
        np.array(lengths, np.int64),
        expert,
        weight,
        values(random, (*expert.shape, width)).astype(np.float32),
        values(random, (*expert.shape, hidden)).astype(np.float32),
        random.uniform(0, 1, size).astype(np.float32),
        kinds,
    )


def totals_of(made, routing=False):
    """The ExpertTotals of a world. routing: as where kernels hide inputs and outputs."""
    shapes = replace(made.shapes, values=not routing)
    sequences, layers = made.lengths.size, len(shapes.layers)
    found = ExpertTotals.zero(STUDY, shapes)
    found.sequences, found.lengths = np.arange(sequences), made.lengths
    found.per_sequence = np.zeros((sequences, layers, shapes.all_experts), np.int64)
    if not routing:
        found.sums = ExpertSums.zero(shapes)
    for sequence, length in enumerate(made.lengths.tolist()):
        found.kinds += made.kinds[:, sequence, :length].sum(axis=1)
        for layer in range(layers):
            bits = made.margins[layer, sequence, :length].view(np.uint32) >> 16
            np.add.at(found.margins[layer], bits, 1)
    _count(made, found, routing)
    return found


def _count(made, found, routing):
    kept, seen = [], set()
    block = np.zeros((*made.margins.shape, made.shapes.hidden))
    for at in made.slots():
        layer, sequence, position, _ = at
        own = layer, int(made.expert[at])
        found.per_sequence[sequence][own] += 1
        found.weight_units[own] += round(float(made.weight[at]) * 2**40)
        found.by_kind[:, own[0], own[1]] += made.kinds[:, sequence, position]
        if routing:
            continue
        for name, values, place in (("down_in", made.down_in[at], "column"), ("output", made.output[at], "channel")):
            column = int(np.abs(values).argmax())
            size = abs(values[column])
            if not size <= getattr(found, f"{name}_max")[own]:
                getattr(found, f"{name}_max")[own] = size
                for where, number in ((place, column), ("sequence", sequence), ("position", position)):
                    getattr(found, f"{name}_{where}")[own] = number
        if (*own, sequence) not in seen:
            seen.add((*own, sequence))
            found.first_row[own] = np.fmax(found.first_row[own], size)
        kept.append((*own, sequence, position, column, size, made.weight[at]))
        _add(made, found.sums, at, own)
        given = made.output[at] * (1 if made.shapes.applied else made.weight[at])
        block[at[:3]] += given.astype(np.float64)
    if routing:
        return
    found.sums.block[:] = (block**2).sum(axis=(1, 2))
    for layer in range(len(made.shapes.layers)):
        mine = sorted((row for row in kept if row[0] == layer), key=lambda row: (-row[5], row[:5]))[:OUTPUTS_KEPT]
        found.outputs = np.concatenate([found.outputs, np.array(mine, OUTPUT)])


def _add(made, sums, at, own):
    values = made.down_in[at]
    sums.rows[own] += 1
    for step, magnitude in enumerate(LADDER):
        sums.hits[(step, *own)] += int((np.abs(values) >= magnitude).sum())
    weight = 1.0 if made.shapes.applied else float(made.weight[at])
    sums.energy[own] += (weight * made.output[at].astype(np.float64)) ** 2
