"""Studies side by side: what is the same, what differs, and the numbers that may be set against each other.

Like is compared with like: numbers of features only under one set of criteria, and where the studies decided by different
readings, sites or magnitudes, the counts that each of their summaries has under common ones. It counts nothing again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outliers.atlas.read import read_summary
from outliers.atlas.row import AtlasFeature, AtlasRow, Conditions, row_of
from outliers.errors import BadInput
from outliers.publish.shelf import Published
from outliers.results.schema import StudySummary
from outliers.spec import BLOCK, READINGS, SITES

CRITERIA = ("reading", "site", "magnitude", "min_layer_fraction", "min_position_fraction")
CONDITIONS = Conditions._fields
IDENTITY = ("model", "revision", "architecture", "total_parameters", "active_parameters", "num_experts")
SHAPE = ("num_layers", "layers_read", "hidden_size", "sites", "label")
"""Facts on which no number depends: the numbers of one site are the same whatever else was captured."""


@dataclass(frozen=True)
class CommonCounts:
    """Numbers of features at one magnitude under the same shares: site -> reading -> one count a study."""

    magnitude: float
    counts: dict[str, dict[str, list[int]]]


@dataclass(frozen=True)
class Comparison:
    """Studies side by side; each list of values has one a study, in their order.

    `same` and `differs` are facts by name; `criteria` and `conditions` name those of them that make numbers unlike.
    `features` is of one model under one set of criteria alone: feature -> its row in each study, None where it is not
    systematic there.
    """

    rows: tuple[AtlasRow, ...]
    same: dict[str, Any]
    differs: dict[str, list[Any]]
    criteria: tuple[str, ...]
    conditions: tuple[str, ...]
    counts: CommonCounts | None
    features: dict[int, list[AtlasFeature | None]] | None

    @property
    def alike(self) -> bool:
        """Whether the studies were made under the same criteria and conditions."""
        return not self.criteria and not self.conditions

    def unlike(self) -> str:
        """What differs of criteria and conditions, with the values; empty where they are alike."""
        return "; ".join(
            f"{name} ({', '.join(format_fact(value) for value in self.differs[name])})"
            for name in (*self.criteria, *self.conditions)
        )

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain JSON."""
        return {
            "studies": [row.model_dump() for row in self.rows],
            "alike": self.alike,
            "same": self.same,
            "differs": self.differs,
            "unlike_criteria": self.criteria,
            "unlike_conditions": self.conditions,
            "counts": None if self.counts is None else asdict(self.counts),
            "features": None
            if self.features is None
            else [{"feature": number, "studies": own} for number, own in self.features.items()],
        }


def compare(studies: Sequence[Published]) -> Comparison:
    """Two or more studies side by side. Raises BadInput for fewer, or one twice; PublishRefused for a damaged one."""
    if len(studies) < 2:
        raise BadInput(f"{len(studies)} study is not compared with anything; give two or more")
    rows = tuple(row_of(study) for study in studies)
    keys = [(row.study_id, row.results_digest) for row in rows]
    twice = next((row for row, key in zip(rows, keys, strict=True) if keys.count(key) > 1), None)
    if twice is not None:
        raise BadInput(f"the study {twice.study_id} is given twice: it is like itself")
    facts = {name: [getattr(row, name) for row in rows] for name in (*IDENTITY, *SHAPE, *CRITERIA, *CONDITIONS)}
    one_model = len(set(facts["model"])) == 1
    compared: tuple[str, ...] = CONDITIONS
    if len({row.capture_id for row in rows}) == 1:  # named by hand as the family's own: the same activations
        compared = tuple(name for name in compared if name != "site_modules")
    if one_model:  # other tokenizers give other ids for one text
        facts["token_sha256"] = [row.token_sha256 for row in rows]
        compared = (*compared, "token_sha256")
    differs = {name: values for name, values in facts.items() if any(value != values[0] for value in values)}
    criteria = tuple(name for name in CRITERIA if name in differs)
    return Comparison(
        rows=rows,
        same={name: values[0] for name, values in facts.items() if name not in differs},
        differs=differs,
        criteria=criteria,
        conditions=tuple(name for name in compared if name in differs),
        counts=common_counts([read_summary(study) for study in studies]),
        features=_features(rows) if one_model and not criteria else None,
    )


def common_counts(summaries: Sequence[StudySummary]) -> CommonCounts | None:
    """Numbers of features by every reading and site that all summaries have, at a magnitude that all have counted.

    The magnitude is the first study's where all have it, else the common one nearest to it. None where the shares of layers
    or tokens differ, or nothing is common: those counts need the capture.
    """
    rules = {(found.criteria.layer_fraction, found.criteria.position_fraction) for found in summaries}
    common = set.intersection(*(set(found.sweep.magnitudes) for found in summaries))
    if len(rules) > 1 or not common:
        return None
    wanted = summaries[0].criteria.magnitude
    magnitude = min(common, key=lambda step: (abs(step - wanted), step))
    counts: dict[str, dict[str, list[int]]] = {}
    for site in (BLOCK, *SITES):
        for reading in READINGS:
            values = [_count(found, site, reading, magnitude) for found in summaries]
            if None not in values:
                counts.setdefault(site, {})[reading] = [value for value in values if value is not None]
    return CommonCounts(magnitude, counts) if counts else None


def _count(found: StudySummary, site: str, reading: str, magnitude: float) -> int | None:
    lines: Mapping[Any, Mapping[Any, list[int]]] = found.sweep.counts
    line = lines.get(site, {}).get(reading)
    return None if line is None else line[found.sweep.magnitudes.index(magnitude)]


def _features(rows: Sequence[AtlasRow]) -> dict[int, list[AtlasFeature | None]]:
    """Every feature that is systematic in one of the studies, those of most studies first, then by magnitude."""
    own = [{item["feature"]: item for item in row.features} for row in rows]
    found = {number: [table.get(number) for table in own] for number in {n for table in own for n in table}}

    def order(item: tuple[int, list[AtlasFeature | None]]) -> tuple[int, float, int]:
        there = [row for row in item[1] if row is not None]
        return -len(there), -max(row["max_magnitude"] for row in there), item[0]

    return dict(sorted(found.items(), key=order))


def format_fact(value: Any) -> str:
    """A fact in few words."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return "+".join(str(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value[:12] if re.fullmatch("[0-9a-f]{40,}", value) else str(value)
