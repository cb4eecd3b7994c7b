"""The journal of a probe -> probes.json and the rows of sensitivity.parquet. No torch here.

Means are over the tokens of all sequences. Intervals are percentiles over resamples of whole sequences of the paired
difference to the untouched model on the same sequences; below FEWEST_SEQUENCES there are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from outliers.errors import ForbiddenFile
from outliers.probe.changes import (
    FLOOR,
    IDENTITY,
    REFERENCE,
    SHARED,
    Change,
    error_formats,
    map_name,
)
from outliers.probe.formats import Ranges, range_source
from outliers.probe.ids import AUTO, asked_of
from outliers.probe.journal import ProbeJournal
from outliers.probe.single_weights import Single
from outliers.results.bootstrap import LEVEL, RESAMPLES, draws
from outliers.results.intervals import FEWEST_SEQUENCES
from outliers.results.schema import first_error
from outliers.results.schema.probes import SENSITIVITY_SCHEMA, Probes
from outliers.results.write import LARGEST_LOSS, identity, json_bytes
from outliers.study.prepare import Prepared

DISTINCT = 2.0
"""A KL below so many times the floor's is not told from rounding."""


@dataclass(frozen=True)
class Gates:
    """What was checked while it was measured. captured: losses of the capture; shared: layers behind which passes begin."""

    captured: Mapping[int, float]
    why_not: str | None
    shared: tuple[int, ...]


class Measured:
    """The lines of a journal, for the sequences of a probe, as sums a sequence."""

    def __init__(self, journal: ProbeJournal, sequences: Sequence[int]) -> None:
        self._done, self.sequences = journal.done, tuple(sequences)
        self.tokens = self.column(REFERENCE, "tokens")
        enough = len(self.sequences) >= FEWEST_SEQUENCES
        self.weights = draws(len(self.sequences), RESAMPLES).astype(np.float64) if enough else None

    def column(self, change: str, name: str) -> NDArray[np.float64]:
        """(sequence,): one measure of a change."""
        return np.array([self._done[change, sequence][name] for sequence in self.sequences], np.float64)

    def mean(self, values: NDArray[np.float64]) -> float | None:
        """Of a token; None where it is not finite."""
        found = math.fsum(values.tolist()) / math.fsum(self.tokens.tolist()) if np.isfinite(values).all() else math.nan
        return found if math.isfinite(found) else None

    def ends(self, values: NDArray[np.float64]) -> list[float] | None:
        """The ends of the mean of a token over resamples of the sequences; None for few sequences, or what is not finite."""
        if self.weights is None or not np.isfinite(values).all():
            return None
        means = np.sort((self.weights @ values) / (self.weights @ self.tokens))
        cut = math.floor((1 - LEVEL) / 2 * means.size)
        return [float(means[cut]), float(means[means.size - 1 - cut])]

    def errors(self, form: str, site: str, layer: int) -> float:
        """Sum of squared errors of a format at a place, or of squares (`square`)."""
        key = f"{site} {layer}"
        return math.fsum(self._done[REFERENCE, sequence]["errors"][form][key] for sequence in self.sequences)


def write_numbers(
    prepared: Prepared,
    probe_id: str,
    journal: ProbeJournal,
    changes: Sequence[Change],
    sequences: Sequence[int],
    gates: Gates,
    ranges: Ranges,
    weights: Sequence[Single],
    device: str,
    prefix: tuple[int, ...],
) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of probes.json, and the rows of sensitivity.parquet. Raises ForbiddenFile for what the schema does not allow."""
    measured = Measured(journal, sequences)
    places = sensitivity_rows(prepared, measured, changes)
    floor = measured.mean(measured.column(FLOOR, "kl"))
    dtype = prepared.model.dtype
    asked = asked_of(prepared.spec)
    known = identity(prepared)
    content = {
        "schema_version": 1,
        "probe_id": probe_id,
        "study_id": prepared.study_id,
        "capture_id": prepared.capture_id,
        "model": known["model"],
        "corpus": known["corpus"],
        "dtype": dtype if asked.probe_dtype == "study" else asked.probe_dtype,
        "device": device,
        "sequences": len(measured.sequences),
        "tokens": int(measured.tokens.sum()) + len(measured.sequences),
        "asked": _asked(prepared),
        "prefix_ids": list(prefix),
        "intervals": _intervals(measured),
        "gates": _gates(measured, changes, gates, floor),
        "reference": _reference(measured),
        "changes": [
            _change(measured, change, floor, ranges, _predicted(change, places))
            for change in changes
            if change.kind != "map"
        ],
        "super_weights": [_weight(measured, single) for single in weights],
    }
    try:
        return json_bytes(Probes.model_validate(content).model_dump()), places
    except ValidationError as error:
        raise ForbiddenFile(
            f"the numbers of the probe {probe_id} are not what is published: {first_error(error)}"
        ) from error


def _asked(prepared: Prepared) -> dict[str, Any]:
    asked: dict[str, Any] = asked_of(prepared.spec).model_dump(mode="json", exclude={"probe"})
    if asked["prefix"] is not None:
        digits = asked["prefix"].replace(",", "").isdigit()
        asked["prefix"] = AUTO if asked["prefix"] == AUTO else "ids" if digits else "text"
    return asked


def _intervals(measured: Measured) -> dict[str, Any]:
    if measured.weights is not None:
        return {"level": LEVEL, "resamples": RESAMPLES, "reason": None}
    count = len(measured.sequences)
    return {
        "level": None,
        "resamples": None,
        "reason": f"{count} sequences: below {FEWEST_SEQUENCES} an interval over sequences covers too little",
    }


def _gates(measured: Measured, changes: Sequence[Change], gates: Gates, floor: float | None) -> dict[str, Any]:
    smallest = next(change for change in changes if change.name == FLOOR)
    names = [name for name in (IDENTITY, SHARED) if any(change.name == name for change in changes)]
    return {
        "reference": {
            "compared": gates.why_not is None,
            "sequences": sum(sequence in gates.captured for sequence in measured.sequences),
            "reason": gates.why_not,
        },
        "identity": {
            "kl": max(float(np.abs(measured.column(name, "kl")).max()) for name in names),
            "shared_behind": list(gates.shared),
        },
        "floor": {
            "site": smallest.sites[0],
            "layer": smallest.layers[0],
            "feature": smallest.features[0],
            "kl": floor,
            "kl_interval": measured.ends(measured.column(FLOOR, "kl")),
        },
    }


def _perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < LARGEST_LOSS else None


def _reference(measured: Measured) -> dict[str, Any]:
    loss = measured.mean(measured.column(REFERENCE, "nll"))
    return {
        "loss": loss,
        "perplexity": _perplexity(loss),
        "top1_probability": _share(measured.mean(measured.column(REFERENCE, "top1_probability"))),
        "tokens": int(measured.tokens.sum()),
    }


def _share(value: float | None) -> float | None:
    """A mean of probabilities, without what rounding adds beyond 1."""
    return None if value is None else min(1.0, max(0.0, value))


def _change(
    measured: Measured, change: Change, floor: float | None, ranges: Ranges, predicted: float | None
) -> dict[str, Any]:
    before, after = measured.column(REFERENCE, "nll"), measured.column(change.name, "nll")
    untouched, loss = measured.mean(before), measured.mean(after)
    moved = measured.ends(after - before)
    agreement = measured.column(change.name, "agreement")
    kl = measured.mean(measured.column(change.name, "kl"))
    ends = None
    if moved is not None and untouched is not None and untouched + moved[1] < LARGEST_LOSS:
        ends = [math.exp(untouched + end) for end in moved]
    return {
        "name": change.name,
        "kind": change.kind,
        "group": change.group,
        "sites": list(change.sites),
        "layers": list(change.layers),
        "features": list(change.features),
        "format": change.format,
        "held_out": list(change.held),
        "weights": change.weights,
        "smooth": change.smooth,
        "first_tokens": change.first_tokens,
        "prefix": change.prefix,
        "ranges": range_source(change, ranges),
        "loss": loss,
        "perplexity": _perplexity(loss),
        "perplexity_interval": ends,
        "kl": kl,
        "kl_interval": measured.ends(measured.column(change.name, "kl")),
        "top1_probability": _share(measured.mean(measured.column(change.name, "top1_probability"))),
        "agreement": _share(measured.mean(agreement)),
        "agreement_interval": measured.ends(agreement),
        "distinguishable": kl is None or (kl > 0 and kl >= DISTINCT * (floor or 0.0)),
        "predicted_kl": predicted,
    }


def _weight(measured: Measured, single: Single) -> dict[str, Any]:
    name = f"weight {single.at.name}" + (f" ({single.group})" if single.of is not None else "")
    return {
        "name": single.at.name,
        "layer": single.at.layer,
        "module": single.at.module,
        "row": single.at.row,
        "column": single.at.column,
        "group": single.group,
        "of": single.of,
        "value": _finite(single.value),
        "output": _finite(single.output),
        "sequence": single.sequence,
        "position": single.position,
        "perplexity": _perplexity(measured.mean(measured.column(name, "nll"))),
        "kl": measured.mean(measured.column(name, "kl")),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sensitivity_rows(prepared: Prepared, measured: Measured, changes: Sequence[Change]) -> list[dict[str, Any]]:
    """A row for each place of the map and each format, the map's own first; none without a map."""
    formats = error_formats(prepared)
    tokens = float(measured.tokens.sum()) + len(measured.sequences)
    found = []
    for change in changes:
        if change.kind != "map":
            continue
        site, layer = change.sites[0], change.layers[0]
        kl = measured.mean(measured.column(map_name(formats[0], site, layer), "kl"))
        square, own = measured.errors("square", site, layer), measured.errors(formats[0], site, layer)
        for form in formats:
            lost = measured.errors(form, site, layer)
            found.append(
                {
                    "site": site,
                    "layer": layer,
                    "format": form,
                    "kl": kl if form == formats[0] else None,
                    "squared_error": _finite(lost / tokens),
                    "relative_error": _finite(lost / square) if square else None,
                    "predicted_kl": kl if form == formats[0] else _scaled(kl, lost, own),
                }
            )
    return found


def _scaled(kl: float | None, lost: float, own: float) -> float | None:
    """The map's KL times a ratio of squared errors; None where the map's format loses nothing and the other does."""
    if kl is None or not math.isfinite(lost) or not math.isfinite(own):
        return None
    if own == 0:
        return 0.0 if lost == 0 else None
    return kl * (lost / own)


def _predicted(change: Change, places: Sequence[Mapping[str, Any]]) -> float | None:
    """What the map says of a format at all its places together: the sum; None without a map, or where a place has none."""
    plain = not (change.held or change.weights or change.smooth or change.prefix) and change.first_tokens
    if change.kind != "format" or not plain:
        return None
    own = [row["predicted_kl"] for row in places if row["format"] == change.format]
    return math.fsum(own) if own and all(value is not None for value in own) else None


def table_of(places: Sequence[Mapping[str, Any]]) -> pa.Table:
    """sensitivity.parquet's table."""
    return pa.Table.from_pylist([dict(row) for row in places], schema=SENSITIVITY_SCHEMA)
