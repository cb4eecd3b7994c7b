"""The atlas: published studies as rows of one table, and which of them may be compared.

`read_atlas` reads a store and keeps what a filter wants, `groups` puts together the rows of identical criteria,
`write_atlas_table` writes them as Parquet. Nothing is counted again. atlas.parquet has a row a study, ordered by total
parameters (unknown last), model, corpus, dtype, study_id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from outliers.atlas.row import AtlasRow, row_of
from outliers.errors import BadInput, PublishRefused
from outliers.files.parquet import write_parquet
from outliers.publish.shelf import ENTRY_ERRORS, Skipped, StoreListing, format_error, read_store
from outliers.results.schema.arrow import arrow_schema

MAX_SAID = 6
"""Values of one option that a refusal names."""
ATLAS_SCHEMA: Any = arrow_schema(AtlasRow)
"""The columns of atlas.parquet, made from `AtlasRow`."""


@dataclass(frozen=True)
class Filter:
    """Which studies are wanted: one value of each tuple must be the study's. An empty tuple filters nothing."""

    readings: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    magnitudes: tuple[float, ...] = ()
    layer_fractions: tuple[float, ...] = ()
    position_fractions: tuple[float, ...] = ()
    dtypes: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    min_tokens: int = 0

    def wanted(self, headline: Mapping[str, Any]) -> bool:
        """Whether a study may be wanted, by its manifest's headline alone: its summary.json need not be read otherwise."""
        return (
            _in(headline["reading"], self.readings)
            and _in(headline["site"], self.sites)
            and headline["num_tokens"] >= self.min_tokens
        )

    def keeps(self, row: AtlasRow) -> bool:
        """Whether a study is wanted."""
        asked: list[tuple[Any, tuple[Any, ...]]] = [
            (row.reading, self.readings),
            (row.site, self.sites),
            (row.magnitude, self.magnitudes),
            (row.min_layer_fraction, self.layer_fractions),
            (row.min_position_fraction, self.position_fractions),
            (row.dtype, self.dtypes),
            (row.corpus, self.corpora),
        ]
        return row.num_tokens >= self.min_tokens and all(_in(value, values) for value, values in asked)

    def words(self) -> str:
        """The options that give this filter; empty where it filters nothing."""
        names = ("reading", "site", "magnitude", "layer-fraction", "position-fraction", "dtype", "corpus")
        values = (getattr(self, field.name) for field in dataclasses.fields(self)[: len(names)])
        said = [
            f"--{name} {','.join(f'{v:g}' if isinstance(v, float) else v for v in own)}"
            for name, own in zip(names, values, strict=True)
            if own
        ]
        return " ".join([*said, *([f"--min-tokens {self.min_tokens}"] if self.min_tokens else [])])


def _in(value: Any, values: tuple[Any, ...]) -> bool:
    return not values or value in values


@dataclass(frozen=True)
class Atlas:
    """The studies of a store that pass a filter, by size; what could not be read; how many the filter left out."""

    url: str
    rows: tuple[AtlasRow, ...]
    skipped: tuple[Skipped, ...]
    left_out: int
    filter: Filter


def read_atlas(target: str, chosen: Filter | None = None) -> Atlas:
    """Every study published at `target` that passes the filter.

    Raises BadInput where there is no study, or none passes, and the errors of `shelf.read_store`.
    """
    chosen = chosen or Filter()
    return make_atlas(read_store(target, summaries=True, wanted=chosen.wanted), chosen)


def make_atlas(shelf: StoreListing, chosen: Filter) -> Atlas:
    """The atlas of what was read of a store."""
    rows: list[AtlasRow] = []
    skipped = list(shelf.skipped)
    for study in shelf.studies:
        try:
            rows.append(row_of(study))
        except PublishRefused as error:
            skipped.append(Skipped(study.url, str(error)))
        except ENTRY_ERRORS as error:
            skipped.append(
                Skipped(study.url, f"{study.url} can't be read ({format_error(error)}); remove it and publish again")
            )
    kept = [row for row in rows if chosen.keeps(row)]
    if not kept and not rows and not shelf.unwanted:
        what = "the one there" if len(skipped) == 1 else f"of {len(skipped):,} the first"
        raise BadInput(f"{shelf.url} holds no study that can be read; {what}: {skipped[0].why}")
    if not kept:
        raise BadInput(
            f"none of the {len(rows) + shelf.unwanted} studies of {shelf.url} passes {chosen.words()}{_there(rows)}"
        )
    kept.sort(key=lambda row: (row.total_parameters is None, row.total_parameters or 0, *_named(row)))
    return Atlas(shelf.url, tuple(kept), tuple(skipped), len(rows) - len(kept) + shelf.unwanted, chosen)


def _named(row: AtlasRow) -> tuple[str, ...]:
    return row.model, row.corpus, row.dtype, row.study_id, row.url


def _there(rows: Sequence[AtlasRow]) -> str:
    """What a filter could have asked of the studies that were read: the values of each option."""
    columns = {
        "magnitude": {f"{row.magnitude:g}" for row in rows},
        "layer-fraction": {f"{row.min_layer_fraction:g}" for row in rows},
        "position-fraction": {f"{row.min_position_fraction:g}" for row in rows},
        "dtype": {row.dtype for row in rows},
        "corpus": {row.corpus for row in rows},
    }
    said = [
        f"--{name} {', '.join(sorted(values)[:MAX_SAID])}" + ", ..." * (len(values) > MAX_SAID)
        for name, values in columns.items()
    ]
    return f"; of that reading, site and size there is: {'; '.join(said)}" if rows else ""


def groups(rows: Iterable[AtlasRow]) -> list[tuple[AtlasRow, ...]]:
    """The rows by identical criteria, the largest group first; the order within is kept."""
    found: dict[tuple[Any, ...], list[AtlasRow]] = {}
    for row in rows:
        found.setdefault(row.criteria, []).append(row)
    return [tuple(own) for _, own in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))]


def atlas_table(rows: Iterable[AtlasRow]) -> Any:
    """The rows as a table of ATLAS_SCHEMA."""
    plain = [{name: getattr(row, name) for name in ATLAS_SCHEMA.names} for row in rows]
    return pa.Table.from_pylist(plain, schema=ATLAS_SCHEMA)


def write_atlas_table(path: Path, rows: Iterable[AtlasRow]) -> None:
    """Write atlas.parquet whole. Raises OSError."""
    write_parquet(path, atlas_table(rows))
