"""The ranges of static formats: which ones a study needs, how they are kept, and how those of shards are joined.

    <summary>/ranges/ranges.npz        largest magnitudes that the summary lacks, of rotated values and without first tokens
    <summary>/ranges/checksums.json    its checksum, written last

A range is a maximum, so ranges of disjoint sequences join in any order to the same bits. What they depend on (the features that
are held out, the ranges in the summary) has a digest, which stands in the file: ranges of other counts are never joined.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outliers.counting.summary import Summary
from outliers.errors import CorruptCapture
from outliers.files.sealed import check_folder, seal_folder
from outliers.quantization.rules import padded
from outliers.quantization.variants import ALL, Variant, corpus_range, spread_evenly, variants_at
from outliers.results.format_errors import Measured
from outliers.study.prepare import Prepared
from outliers.untrusted.npz import UNREADABLE, open_npz

FOLDER, RANGES = "ranges", "ranges.npz"

Key = tuple[str, int, int, str]
"""Site, block size of the rotation, number of held features, range."""


def kept_of(held: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(padded feature,) float32: 0 where a feature is held out, else 1."""
    found = np.ones(padded(held.size), np.float32)
    found[: held.size][held] = 0
    return found


def key_of(site: str, one: Variant) -> Key:
    return site, one.format.rotation, one.held_out, one.range or ALL


@dataclass(frozen=True)
class FormatPlan:
    """What is measured of a study: the variants at each site, and the sample. summary: of the whole corpus.

    lengths: (sequence,) int64, tokens of every sequence of the corpus. chosen: numbers of the sequences whose errors are
    measured, ascending.
    """

    prepared: Prepared
    summary: Summary
    lengths: NDArray[np.int64]
    sites: dict[str, tuple[Variant, ...]]
    chosen: NDArray[np.int64]

    @classmethod
    def of(cls, prepared: Prepared, summary: Summary, lengths: NDArray[np.int64]) -> FormatPlan:
        sites = {site: variants_at(prepared, summary, site) for site in summary.frame.captured}
        return cls(prepared, summary, lengths, sites, spread_evenly(lengths, prepared.spec.formats.format_tokens))

    @cached_property
    def scanned(self) -> dict[Key, NDArray[np.float32]]:
        """What the summary lacks, and the mask of held features of each as `kept_of`."""
        return {key_of(site, one): kept_of(one.held) for site, own in self.sites.items() for one in own if one.scans}

    def rows(self) -> tuple[Measured, ...]:
        """What each row of the table is of, in its order; layers have their own numbers."""
        return tuple(
            Measured(site, layer, one.format.name, one.held_out, one.range)
            for site, variants in self.sites.items()
            for layer in self.prepared.layers
            for one in variants
        )

    @cached_property
    def digest(self) -> str:
        """sha256 of what scanned ranges depend on: held features, and the ranges that the summary has."""
        found = hashlib.sha256(self.prepared.study_id.encode())
        for site, variants in self.sites.items():
            found.update(site.encode())
            for held in {one.held_out: one.held for one in variants}.values():
                found.update(np.packbits(held).tobytes())
            for layer in range(self.summary.frame.num_layers):
                found.update(corpus_range(self.summary, site, layer).tobytes())
        return found.hexdigest()


class Ranges:
    """The largest magnitudes of static formats, of some sequences. largest: key -> (layer, padded feature) float32."""

    def __init__(self, plan: FormatPlan, sequences: Iterable[int]) -> None:
        self.plan, self.sequences = plan, tuple(sequences)
        layers = plan.summary.frame.num_layers
        self.largest = {key: np.zeros((layers, kept.size), np.float32) for key, kept in plan.scanned.items()}

    def raise_to(self, layer: int, largest: dict[Key, NDArray[np.float32]]) -> None:
        """Count in what one unit of a layer has."""
        for key, found in largest.items():
            np.maximum(self.largest[key][layer], found, out=self.largest[key][layer])

    def at(self, site: str, layer: int, one: Variant) -> NDArray[np.float32] | None:
        """(feature,) float32; None for a format that needs none."""
        if one.range is None:
            return None
        if one.scans:
            return self.largest[key_of(site, one)][layer, : one.held.size]
        found = corpus_range(self.plan.summary, site, layer)
        found[one.held] = 0
        return found

    @cached_property
    def digest(self) -> str:
        """sha256 of all that the scales of static formats depend on."""
        found = hashlib.sha256(self.plan.digest.encode())
        for key, values in self.largest.items():
            found.update(json.dumps(key).encode() + values.tobytes())
        return found.hexdigest()


def write_ranges(summary: Path, ranges: Ranges) -> None:
    """Write ranges next to the summary in a folder, and their checksum last."""
    folder = summary / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arrays = {f"largest.{number}": values for number, values in enumerate(ranges.largest.values())}
    names = np.array(json.dumps(list(ranges.largest)))
    np.savez(
        folder / RANGES,
        plan=np.array(ranges.plan.digest),
        sequences=np.array(ranges.sequences, np.int64),
        keys=names,
        **arrays,  # type: ignore[arg-type]  # numpy's types take a keyword that is any array for its own `allow_pickle`
    )
    seal_folder(folder, (RANGES,))


def read_ranges(summary: Path, plan: FormatPlan) -> Ranges | None:
    """The ranges next to the summary in a folder; None where there are none, or those of another plan.

    Raises CorruptCapture where they can't be read, or are no ranges.
    """
    path = summary / FOLDER / RANGES
    if not path.exists() or not check_folder(summary / FOLDER):
        return None
    try:
        with open_npz(path) as stored:
            if str(stored["plan"]) != plan.digest:
                return None
            found = Ranges(plan, (int(number) for number in stored["sequences"]))
            if [tuple(key) for key in json.loads(str(stored["keys"]))] != list(found.largest):
                raise ValueError("they are of other formats than the study's")
            for number, values in enumerate(found.largest.values()):
                own = stored[f"largest.{number}"]
                if (
                    own.shape != values.shape
                    or own.dtype != values.dtype
                    or not (own >= 0).all()
                    or np.isinf(own).any()
                ):
                    raise ValueError(f"number {number} of them holds no magnitudes")
                values[:] = own
    except UNREADABLE as error:
        raise CorruptCapture(f"{path} can't be read: {error}; measure the formats of those sequences again") from error
    return found
