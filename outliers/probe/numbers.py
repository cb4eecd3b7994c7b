"""The journal of a probe -> probes.json and the rows of sensitivity.parquet.

Means are over the tokens of all sequences. Intervals are percentiles over resamples of whole sequences of the paired
difference to the untouched model on the same sequences; below FEWEST_SEQUENCES there are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from outliers.errors import ForbiddenFile
from outliers.probe import changes as plan
from outliers.probe.asked import asked_of
from outliers.probe.changes import FLOOR, IDENTITY, REFERENCE, SHARED, error_formats, map_name, quantized_sites
from outliers.probe.expert_choice import NO_EXPERTS, Expert, ExpertChoice, name_of, routed_layers
from outliers.probe.formats import Ranges, range_source
from outliers.probe.journal import ProbeJournal
from outliers.probe.single_weights import Single
from outliers.results.bootstrap import LEVEL, RESAMPLES, draws
from outliers.results.intervals import FEWEST_SEQUENCES
from outliers.results.schema import Change, Gate, Gates, Probes, Reference, SuperWeight, first_error
from outliers.results.write import LARGEST_LOSS, json_bytes
from outliers.spec import SITES
from outliers.spec.formats import parse_format
from outliers.spec.probe import SUPER
from outliers.study.prepare import Prepared

DISTINCT = 2.0
"""A KL below this many times the floor's can't be distinguished from rounding."""


@dataclass(frozen=True)
class Checked:
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

    def mean(self, change: str, name: str) -> float:
        """Of a token; NaN where a sequence's is not finite."""
        values = self.column(change, name)
        if not np.isfinite(values).all():
            return math.nan
        return math.fsum(values.tolist()) / math.fsum(self.tokens.tolist())

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


@dataclass(frozen=True)
class Made:
    """What a probe was made of, for its numbers. prefix: ids before each sequence where a change has them. silenced: experts,
    with the tokens that reach them. super_experts: of the study; None where it says nothing of them."""

    prepared: Prepared
    probe_id: str
    changes: tuple[plan.Change, ...]
    checked: Checked
    ranges: Ranges
    weights: tuple[Single, ...]
    prefix: tuple[int, ...]
    silenced: ExpertChoice = NO_EXPERTS
    super_experts: tuple[Expert, ...] | None = None


def write_numbers(made: Made, journal: ProbeJournal, sequences: Sequence[int]) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of probes.json, and the rows of sensitivity.parquet.

    Raises ForbiddenFile for numbers that the schema does not allow.
    """
    measured, asked = Measured(journal, sequences), asked_of(made.prepared.spec)
    rows = sensitivity_rows(made, measured)
    floor = measured.mean(FLOOR, "kl")
    loss = measured.mean(REFERENCE, "nll")
    reported = [change for change in made.changes if change.kind not in ("identity", "floor")]
    whole = [change for change in reported if _is_finite(measured, change)]
    try:
        content = Probes(
            probe_id=made.probe_id,
            study_id=made.prepared.study_id,
            capture_id=made.prepared.capture_id,
            model=made.prepared.model.source.id,
            corpus=made.prepared.corpus.source,
            dtype=made.prepared.model.dtype if asked.probe_dtype == "study" else asked.probe_dtype,
            sequences=len(measured.sequences),
            tokens=int(measured.tokens.sum()),
            sites=[site for site in SITES if site in quantized_sites(made.prepared)],
            gates=_gates(measured, made, floor),
            reference=Reference(
                perplexity=_perplexity(loss), nll=loss, top1_probability=_share(measured, REFERENCE, "top1_probability")
            ),
            changes=[_change(measured, made, change, floor, rows) for change in whole],
            super_weights=[_super_weight(single) for single in made.weights if single.output is not None],
            notes=_notes(measured, made, floor, [change.name for change in reported if change not in whole]),
        )
    except ValidationError as error:
        raise ForbiddenFile(
            f"the numbers of the probe {made.probe_id} are not what is published: {first_error(error)}"
        ) from error
    return json_bytes(content.model_dump(mode="json")), rows


def _is_finite(measured: Measured, change: plan.Change) -> bool:
    """Whether a change gives numbers, and a perplexity within float64."""
    values = [measured.mean(change.name, name) for name in ("nll", "kl", "top1_probability")]
    return all(map(math.isfinite, values)) and values[0] < LARGEST_LOSS


def _notes(measured: Measured, made: Made, floor: float, left_out: list[str]) -> list[str]:
    found = [
        "a format at a site is emulated: values are rounded as the format's rule says and computed with in the model's dtype; a "
        "kernel that multiplies in the format adds up in another order"
    ]
    count = len(measured.sequences)
    if measured.weights is None:
        found.append(f"{count} sequences: under {FEWEST_SEQUENCES} there are no intervals")
    if made.checked.why_not is not None:
        found.append(f"the untouched pass was not compared with the capture: {made.checked.why_not}")
    if not floor > 0:
        found.append("moving one feature by its last bit changed nothing: the floor is 0, and every KL above 0 counts")
    found += _expert_notes(made)
    if left_out:
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        found.append(f"gave values that are not finite, and are left out: {', '.join(left_out[:8])}{more}"[:1_000])
    if any(change.kind == "map" for change in made.changes):
        found.append(
            "the sum of a map's predictions takes what its places cost to add up, which holds where each is small"
        )
    return found


def _expert_notes(made: Made) -> list[str]:
    chosen, found = made.silenced, []
    if chosen.singles:
        found.append(
            "a silent expert has the routing weight 0; the other experts of its tokens keep theirs, and nothing is renormalised"
        )
    if any(change.kind == "map" and change.experts for change in made.changes):
        found.append(
            "of an expert of the map the input of its first projection is quantized; the other experts of its tokens, routers, "
            "and shared experts get what they got"
        )
    if chosen.unreached:
        names = ", ".join(map(name_of, chosen.unreached[:8]))
        more = f" and {len(chosen.unreached) - 8} more" if len(chosen.unreached) > 8 else ""
        found.append(f"no token of the probe reaches expert {names}{more}: what it does is unknown")
    if SUPER in asked_of(made.prepared.spec).experts and routed_layers(made.prepared) and not made.super_experts:
        known = "says nothing of super experts" if made.super_experts is None else "has no super expert"
        found.append(f"the study {known}: none was silenced")
    return found


def _gates(measured: Measured, made: Made, floor: float) -> Gates:
    compared = [sequence for sequence in measured.sequences if sequence in made.checked.captured]
    why_not = made.checked.why_not
    if why_not is None and len(compared) < len(measured.sequences):
        why_not = f"the capture's journal has losses of {len(compared)} of {len(measured.sequences)} sequences"
    names = {change.name for change in made.changes} & {IDENTITY, SHARED}
    smallest = next(change for change in made.changes if change.name == FLOOR)
    finite = math.isfinite(floor)
    return Gates(
        reference=Gate(compared=why_not is None, reason=why_not, value=0.0 if compared else None),
        identity=Gate(
            compared=True, reason=None, value=max(float(np.abs(measured.column(name, "kl")).max()) for name in names)
        ),
        floor=Gate(
            compared=finite,
            reason=None if finite else f"moving feature {smallest.features[0]} by its last bit gave no finite KL",
            value=floor if finite else None,
        ),
        prefix_sharing=bool(made.checked.shared),
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


def _share(measured: Measured, change: str, name: str) -> float:
    """A mean of probabilities, without what rounding adds beyond 1."""
    return min(1.0, max(0.0, measured.mean(change, name)))


_KINDS: dict[str, str] = {"format": "quantize", "weights": "quantize"}
_GROUPS: dict[str, str] = {"asked": "given", "control random": "control", "control nearest": "control"}


def _group(change: plan.Change) -> str:
    """The word for what is changed: `each` is one systematic feature of several alone; a format's own name for a format."""
    if change.kind in ("format", "map", "weights", "experts"):
        return str(change.format or change.weights)
    if change.kind == "prefix":
        return "prefix"
    if change.group == "systematic" and change.alone:
        return "each"
    return _GROUPS.get(change.group, change.group)


def _range(change: plan.Change) -> str | None:
    if change.format is None or not parse_format(change.format).is_static:
        return None
    return "all" if change.first_tokens else "without_first_tokens"


def _change(
    measured: Measured, made: Made, change: plan.Change, floor: float, rows: Sequence[Mapping[str, Any]]
) -> Change:
    before, after = measured.column(REFERENCE, "nll"), measured.column(change.name, "nll")
    moved, loss = measured.ends(after - before), measured.mean(REFERENCE, "nll")
    kl = measured.mean(change.name, "kl")
    values = {single.at.name: single.value for single in made.weights}
    weight = change.weight.name if change.weight else None
    ends = [math.exp(loss + end) for end in moved] if moved and loss + moved[1] < LARGEST_LOSS else None
    return Change.model_validate(
        {
            "name": change.name,
            "kind": _KINDS.get(change.kind, change.kind),
            "group": _group(change),
            "sites": list(change.sites),
            "layers": list(change.layers),
            "features": list(change.features),
            "format": change.format,
            "weights": change.weights,
            "held": list(change.held),
            "range": _range(change),
            "ranges_of": range_source(change, made.ranges),
            "smooth": change.smooth,
            "prefix": list(made.prefix) if change.prefix else [],
            "weight": weight,
            "value": values[weight] if weight else None,
            "control_of": change.of,
            "experts": [name_of(at) for at in change.experts],
            "expert_tokens": [(made.silenced.tokens or {})[at] for at in change.experts],
            "perplexity": _perplexity(measured.mean(change.name, "nll")),
            "perplexity_interval": ends,
            "kl": kl,
            "kl_interval": measured.ends(measured.column(change.name, "kl")),
            "top1_probability": _share(measured, change.name, "top1_probability"),
            "agreement": _share(measured, change.name, "agreement"),
            "agreement_interval": measured.ends(measured.column(change.name, "agreement")),
            "distinguishable": kl > 0 and not kl < DISTINCT * floor,
            "predicted_kl": _predicted(change, rows),
        }
    )


def _super_weight(single: Single) -> SuperWeight:
    return SuperWeight.model_validate(
        {
            "layer": single.at.layer,
            "module": single.at.module,
            "row": single.at.row,
            "column": single.at.column,
            "value": single.value,
            "output": single.output,
            "input": single.input,
            "sequence": single.sequence,
            "position": single.position,
        }
    )


def sensitivity_rows(made: Made, measured: Measured) -> list[dict[str, Any]]:
    """A row for each place of the map and each format, the map's own first; none without a map."""
    formats = error_formats(made.prepared)
    tokens = float(measured.tokens.sum()) + len(measured.sequences)
    found = []
    for change in made.changes:
        if change.kind != "map" or change.experts:
            continue
        site, layer = change.sites[0], change.layers[0]
        kl = measured.mean(map_name(formats[0], site, layer), "kl")
        square, own = measured.errors("square", site, layer), measured.errors(formats[0], site, layer)
        for form in formats:
            lost = measured.errors(form, site, layer)
            if not (math.isfinite(lost) and math.isfinite(square)):
                continue  # a row that is not there is seen; one with a made-up number is not
            found.append(
                {
                    "site": site,
                    "layer": layer,
                    "format": form,
                    "kl": _finite(kl) if form == formats[0] else None,
                    "squared_error": lost / tokens,
                    "relative_error": lost / square if square else 0.0,
                    "predicted_kl": _finite(kl) if form == formats[0] else _scaled(kl, lost, own),
                }
            )
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _scaled(kl: float, lost: float, own: float) -> float | None:
    """The map's KL times a ratio of squared errors; None where the map's format loses nothing and the other does."""
    if not math.isfinite(kl) or not math.isfinite(own):
        return None
    if own == 0:
        return 0.0 if lost == 0 else None
    return _finite(kl * (lost / own))


def _predicted(change: plan.Change, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """What the map says of a format at all its places together: the sum; None without a map, or where a place has none."""
    plain = not (change.held or change.weights or change.smooth or change.prefix) and change.first_tokens
    if change.kind != "format" or not plain:
        return None
    own = [row["predicted_kl"] for row in rows if row["format"] == change.format]
    if len(own) < len(change.sites) * len(change.layers) or any(value is None for value in own):
        return None
    return math.fsum(own)
