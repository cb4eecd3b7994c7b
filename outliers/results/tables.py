"""A Summary -> features.parquet: a row for each site, layer and feature, with the columns of `schema.FeatureRecord`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from outliers.counting.summary import Summary
from outliers.results.scale import magnitudes
from outliers.results.schema import FEATURES_SCHEMA

PUBLISHED_ROWS = 30_000
"""Most rows of features.parquet that leave the machine, about a megabyte. Where `resid` is captured, every feature of every
layer has hits."""


def published_rows(table: pa.Table, systematic: list[int], site: str) -> tuple[pa.Table, int]:
    """The rows with a hit, and how many of them are left out.

    Of more than PUBLISHED_ROWS, those of the `systematic` features (numbers) at the deciding site are kept first, then the
    largest by max_magnitude. The order of the table is kept.
    """
    hit = table.filter(pc.greater(table["hits"], 0))
    if hit.num_rows <= PUBLISHED_ROWS:
        return hit, 0
    feature, largest = hit["feature"].to_numpy(), hit["max_magnitude"].to_numpy()
    first = np.isin(feature, np.array(systematic, np.int32)) & (
        np.asarray(hit["site"].to_pylist(), dtype=object) == site
    )
    order = np.lexsort((np.arange(feature.size), -largest, ~first))
    kept = np.sort(order[:PUBLISHED_ROWS])
    return hit.take(pa.array(kept)), hit.num_rows - kept.size


def feature_table(summary: Summary, layers: tuple[int, ...]) -> pa.Table:
    """A row for each site, layer and feature, in that order, as `schema.FEATURES_SCHEMA`. layers: their own numbers."""
    return pa.concat_tables([_site_rows(summary, site, layers) for site in summary.frame.sites])


def _site_rows(summary: Summary, site: str, numbers: tuple[int, ...]) -> pa.Table:
    frame, totals = summary.frame, summary.sites[site]
    step = frame.deciding_step
    layers, width = totals.max.shape
    count = layers * width
    ladder = np.moveaxis(totals.hits, 0, -1).reshape(count, -1)
    offsets = np.arange(count + 1, dtype=np.int32) * ladder.shape[1]
    finite = np.isfinite(totals.max)
    high = np.where(finite, totals.max, np.nan).ravel()
    low = np.where(finite, totals.min, np.nan).ravel()
    columns: dict[str, Any] = {
        "site": pa.array([site] * count, pa.string()),
        "layer": np.repeat(np.array(numbers, dtype=np.int32), width),
        "feature": np.tile(np.arange(width, dtype=np.int32), layers),
        "tokens": totals.finite.ravel() if totals.finite.size else np.full(count, summary.tokens, np.int64),
        "hits": totals.hits[step].ravel(),
        "ladder_hits": pa.ListArray.from_arrays(offsets, pa.array(ladder.ravel())),
        "first_token_hits": totals.first_hits[step].ravel(),
        "min": low,
        "max": high,
        "max_magnitude": np.maximum(np.abs(high), np.abs(low)),
        **_moments(summary, site, count),
        "max_sd": magnitudes(summary, site).astype(np.float32).ravel(),
    }
    arrays = [_column(columns[field.name], field.type) for field in FEATURES_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=FEATURES_SCHEMA)


def _column(values: Any, kind: Any) -> pa.Array:
    """A column of one type; NaN becomes null."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return pa.array(values, type=kind, mask=np.isnan(values))
    return values if isinstance(values, pa.Array) else pa.array(values, type=kind)


def _moments(summary: Summary, site: str, count: int) -> dict[str, Any]:
    """mean, std, kurtosis (Pearson) of each feature as float32, from float64 sums; null for block and constants."""
    totals = summary.sites[site]
    if not totals.moments.size:
        return {name: pa.nulls(count, pa.float32()) for name in ("mean", "std", "kurtosis")}
    counted = np.maximum(totals.finite.ravel(), 1)
    s1, s2, s3, s4 = (total.ravel() / counted for total in totals.moments)
    variance = np.maximum(s2 - s1**2, 0)
    fourth = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = np.where(variance > 0, fourth / variance**2, np.nan)
    return {
        "mean": s1.astype(np.float32),
        "std": np.sqrt(variance).astype(np.float32),
        "kurtosis": tail.astype(np.float32),
    }
