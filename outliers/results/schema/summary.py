"""The exact form of what a study gives: features.parquet, summary.json and tokens.json.

Strict on purpose: unknown keys, wrong types, lists longer than their meaning allows and rows that repeat are errors, so
that nothing but a study's numbers fits in. It knows nothing of files' names, publishing or how a number was counted.
Before it: `report` writes these files. After it: `allowlist` lets only what is valid here leave the machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from outliers.results.intervals import ShareSpan
from outliers.spec import BLOCK

FEATURES_SCHEMA: Any = pa.schema(
    [
        ("site", pa.string()),
        ("layer", pa.int32()),
        ("feature", pa.int32()),
        ("tokens", pa.int64()),
        ("hits", pa.int64()),
        ("ladder_hits", pa.list_(pa.int64())),
        ("first_token_hits", pa.int64()),
        ("min", pa.float32()),
        ("max", pa.float32()),
        ("max_magnitude", pa.float32()),
        ("mean", pa.float32()),
        ("std", pa.float32()),
        ("kurtosis", pa.float32()),
        ("max_sd", pa.float32()),
    ]
)
"""A row per (site, layer, feature); counts in tokens; ladder_hits as summary.json's sweep magnitudes, ascending."""

EARLIER_FEATURES_SCHEMA: Any = FEATURES_SCHEMA.remove(FEATURES_SCHEMA.get_field_index("max_sd"))
"""Of studies that were published before max_sd was counted."""

MOMENT_COLUMNS = ("mean", "std", "kurtosis")
"""Float sums, equal to 1e-12 only; null at `block`, whose values are two tensors'."""
NULLABLE_COLUMNS = (*MOMENT_COLUMNS, "max_sd")
"""max_sd is null where all values of a layer are equal."""

MAX_LAYERS = 1_024
MAX_FEATURES = 1 << 17
MAX_MAGNITUDES = 33
"""The ladder's 32 and the deciding one."""
MAX_MASSIVE = 1_000
MAX_QUANTILES = 16
MAX_BINS = 4_096
MAX_TOP = 100
MAX_TOKEN_FEATURES = 1_024

Site = Literal["attn_in", "mlp_in", "o_in", "resid", "block"]
Reading = Literal["pooled", "union", "per_layer", "affected"]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
SweepLine = Annotated[list[Count], Field(max_length=MAX_MAGNITUDES)]
Steps = SweepLine
Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Feature = Annotated[int, Field(ge=0, lt=MAX_FEATURES)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=300)]
# A folder of this machine is no name: neither /home/me/model nor ~/model nor C:\model.
PublicName = Annotated[str, Field(min_length=1, max_length=300, pattern=r"^[A-Za-z0-9][^\\]*$")]
Note = Annotated[str, Field(max_length=1_000)]
Context = Annotated[str, Field(max_length=400)]
Digest = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _unique(keys: Iterable[Hashable], what: str) -> None:
    seen: set[Hashable] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{what} {key} is there twice")
        seen.add(key)


def _ascending(values: list[int] | list[float], what: str) -> None:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{what} are not in ascending order")


class ModelBlock(_Strict):
    """The model that was read."""

    id: PublicName
    revision: Name | None
    architecture: Name
    total_parameters: Count | None
    active_parameters: Count | None
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    hidden_size: Annotated[int, Field(ge=1, le=MAX_FEATURES)]
    dtype: Name
    num_experts: Count | None
    quantization: Name | None = None


class CorpusBlock(_Strict):
    """The tokens that it read."""

    source: PublicName
    num_sequences: Count
    sequence_length: Count
    num_tokens: Count
    token_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    num_documents: Count | None = None
    publish_text: Name | None = None


class CriteriaBlock(_Strict):
    """What was looked for."""

    magnitude: Number
    layer_fraction: Share
    position_fraction: Share
    reading: Literal["pooled", "union", "per_layer", "affected"]
    sites: Annotated[list[Site], Field(min_length=1, max_length=5)]
    site: Site
    ladder: Annotated[list[Number], Field(max_length=MAX_MAGNITUDES)]


class IntervalBlock(_Strict):
    """The ends beside a share of tokens, which `intervals.shares` names, and the share of draws in which the feature passes.

    layer_fraction: percentiles over draws, in studies of before alone: a share of layers only grows with the corpus.
    """

    layer_fraction: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    position_fraction: Annotated[list[Share], Field(min_length=2, max_length=2)] | None
    passes: Share


class FeatureRow(_Strict):
    """FEATURE: one feature of one list."""

    feature: Feature
    layer_fraction: Share
    position_fraction: Share | None
    layers: Annotated[list[Layer], Field(max_length=MAX_LAYERS)]
    hits: Count
    max_magnitude: Number
    min: Number
    max: Number
    sequences: Count
    of_sequences: Count
    first_token_hits: Count
    interval: IntervalBlock | None = None
    max_sd: Size | None = None

    @model_validator(mode="after")
    def _sorted(self) -> FeatureRow:
        _ascending(self.layers, f"the layers of feature {self.feature}")
        return self


FeatureNumbers = Annotated[list[Feature], Field(max_length=MAX_FEATURES)]
FeatureList = Annotated[list[FeatureRow], Field(max_length=MAX_FEATURES)]


class Legacy(_Strict):
    """The earlier pipeline's headline; its features at block only."""

    feature_sequence_pairs: Count
    features: FeatureList


class Readings(_Strict):
    """The four readings of one site, and the earlier pipeline's."""

    pooled: FeatureList
    union: FeatureList
    per_layer: FeatureList
    affected: FeatureList
    legacy: Legacy | None = None

    @model_validator(mode="after")
    def _once(self) -> Readings:
        for rows in (self.pooled, self.union, self.per_layer, self.affected):
            _unique((row.feature for row in rows), "feature")
        return self


class LayerRow(_Strict):
    """One layer of one site."""

    site: Site
    layer: Layer
    max_magnitude: Number | None
    hits: Count
    nonfinite: Count
    kurtosis: Number | None
    median_magnitude: Number | None
    quantiles: Annotated[list[Number], Field(max_length=MAX_QUANTILES)] | None = None
    mean_inf_norm: Number | None = None
    standard_deviation: Size | None = None
    sd_hits: Steps | None = None
    sd_features: Steps | None = None


class MassiveRow(_Strict):
    """One massive activation, at resid."""

    layer: Layer
    sequence: Count
    position: Count
    token: Context | None
    feature: Feature
    value: Number
    ratio: Number | None
    token_median: Number
    token_ratio: Number | None


class Sweep(_Strict):
    """How many features each reading finds at each magnitude."""

    magnitudes: Annotated[list[Number], Field(max_length=MAX_MAGNITUDES)]
    counts: dict[Site, dict[Reading, SweepLine]]
    counts_without_first_tokens: dict[Site, dict[Reading, SweepLine]] = {}

    @model_validator(mode="after")
    def _same_length(self) -> Sweep:
        _ascending(self.magnitudes, "the magnitudes of the sweep")
        for lines in (*self.counts.items(), *self.counts_without_first_tokens.items()):
            for reading, counts in lines[1].items():
                if len(counts) != len(self.magnitudes):
                    raise ValueError(
                        f"{lines[0]} {reading} has {len(counts)} counts for {len(self.magnitudes)} magnitudes"
                    )
        return self


class DeviationLadder(_Strict):
    """How many features reach each multiple of their layer's standard deviation: anywhere, and in enough layers."""

    multiples: Annotated[list[Size], Field(max_length=MAX_MAGNITUDES)]
    features: dict[Site, Steps]
    features_in_layers: dict[Site, Steps]

    @model_validator(mode="after")
    def _same_length(self) -> DeviationLadder:
        _ascending(self.multiples, "the multiples of sd_ladder")
        for site, counts in (*self.features.items(), *self.features_in_layers.items()):
            if len(counts) != len(self.multiples):
                raise ValueError(f"sd_ladder of {site} has {len(counts)} counts for {len(self.multiples)} multiples")
        return self


class IntervalCounts(_Strict):
    """Over draws of whole sequences: how many features pass each reading, in the middle `level` of the draws.

    shares: what the ends beside a share of tokens are; studies of before do not say, there they are percentiles of the draws.
    """

    level: Share
    resamples: Count
    seed: Count
    counts: dict[Site, dict[Reading, Annotated[list[Count], Field(min_length=2, max_length=2)]]]
    shares: ShareSpan | None = None


class Histogram(_Strict):
    """Values by magnitude: counts[i] of them from lower_edges[i] on."""

    lower_edges: Annotated[list[Number], Field(max_length=MAX_BINS)]
    counts: Annotated[list[Count], Field(max_length=MAX_BINS)]

    @model_validator(mode="after")
    def _same_length(self) -> Histogram:
        _ascending(self.lower_edges, "lower_edges")
        if len(self.lower_edges) != len(self.counts):
            raise ValueError(f"{len(self.counts)} counts for {len(self.lower_edges)} lower_edges")
        return self


class Perplexity(_Strict):
    """exp of the mean negative log-likelihood a token: null where that is beyond float64; `loss` null where it is not finite."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    loss: Number | None
    tokens: Count


class Summary(_Strict):
    """summary.json, schema_version 1."""

    schema_version: Literal[1]
    study_id: Digest
    capture_id: Digest
    model: ModelBlock
    corpus: CorpusBlock
    criteria: CriteriaBlock
    readings: dict[Site, Readings]
    systematic: FeatureList
    layers: Annotated[list[LayerRow], Field(max_length=5 * MAX_LAYERS)]
    massive: Annotated[list[MassiveRow], Field(max_length=MAX_MASSIVE)] | None
    massive_count: Count | None
    sweep: Sweep
    histogram: dict[Site, Histogram]
    notes: Annotated[list[Note], Field(max_length=100)]
    # there only where it was asked for
    perplexity: Perplexity | None = None
    # not in what the first versions published
    reading_counts: dict[Site, dict[Reading | Literal["legacy"], Count]] = {}
    without_first_tokens: dict[Site, dict[Reading, FeatureNumbers]] = {}
    intervals: IntervalCounts | None = None
    massive_by_token: Annotated[list[MassiveRow], Field(max_length=MAX_MASSIVE)] | None = None
    massive_by_token_count: Count | None = None
    massive_undecided: Count | None = None
    sd_ladder: DeviationLadder | None = None
    quantile_levels: Annotated[list[Share], Field(max_length=MAX_QUANTILES)] = []

    @model_validator(mode="after")
    def _consistent(self) -> Summary:
        _unique((row.feature for row in self.systematic), "systematic feature")
        _unique(((row.site, row.layer) for row in self.layers), "layer")
        beyond = [row.layer for row in self.layers if row.layer >= self.model.num_layers]
        if beyond:
            raise ValueError(f"layer {beyond[0]} of a model with {self.model.num_layers} layers")
        self._check_features()
        for site, readings in self.readings.items():
            if site != BLOCK and readings.legacy is not None:
                raise ValueError(f"the reading legacy stands at block only, not at {site}")
        return self

    def _check_features(self) -> None:
        """Every listed feature and layer is one that the model has and that was read."""
        layers, width = {row.layer for row in self.layers}, self.max_width
        lists = [self.systematic]
        for own in self.readings.values():
            lists += [
                own.pooled,
                own.union,
                own.per_layer,
                own.affected,
                *([own.legacy.features] if own.legacy else []),
            ]
        for row in itertools.chain.from_iterable(lists):
            if row.feature >= width:
                raise ValueError(f"feature {row.feature} of a model with at most {width} a site")
            if not layers.issuperset(row.layers):
                raise ValueError(f"feature {row.feature} has a layer that was not read")
        for massive in (*(self.massive or ()), *(self.massive_by_token or ())):
            if massive.feature >= width or massive.layer not in layers:
                raise ValueError(
                    f"a massive activation at feature {massive.feature} of layer {massive.layer}, not read"
                )

    @property
    def max_width(self) -> int:
        """Most features a site can have: o_in is wider than the hidden size (3 x at GLM-4.5-Air), never 8 times."""
        return 8 * self.model.hidden_size

    @property
    def max_rows(self) -> int:
        """Most rows features.parquet can have: every captured (site, layer), and block's, in full width."""
        sites = len(self.readings) or 5
        return sites * self.model.num_layers * self.max_width


class Positions(_Strict):
    """Hits by position in the sequence, bins of bin_tokens."""

    bin_tokens: Annotated[int, Field(ge=1)]
    counts: Annotated[list[Count], Field(max_length=MAX_BINS)]


class Place(_Strict):
    """One value in its text; the text is null where it may not be published."""

    sequence: Count
    position: Count
    layer: Layer
    value: Number
    token: Context | None
    before: Context | None
    after: Context | None


class TopPlace(Place):
    """One of a feature's largest values."""

    site: Site


class MassivePlace(Place):
    """One massive activation."""

    feature: Feature


class TokenFeature(_Strict):
    """Where one feature's hits sit."""

    feature: Feature
    tokens: Count
    first_token_share: Share | None
    delimiter_share: Share | None
    special_share: Share | None = None
    positions: Positions
    top: Annotated[list[TopPlace], Field(max_length=MAX_TOP)]


class MassiveFeature(_Strict):
    """Where the listed massive activations of one feature sit."""

    feature: Feature
    tokens: Count
    first_token_share: Share
    delimiter_share: Share
    special_share: Share | None = None
    positions: Positions


class Tokens(_Strict):
    """tokens.json, schema_version 1."""

    schema_version: Literal[1]
    study_id: Digest
    site: Site
    text: bool
    features: Annotated[list[TokenFeature], Field(max_length=MAX_TOKEN_FEATURES)]
    massive: Annotated[list[MassivePlace], Field(max_length=MAX_MASSIVE)] | None
    massive_features: Annotated[list[MassiveFeature], Field(max_length=MAX_TOKEN_FEATURES)] = []

    @model_validator(mode="after")
    def _consistent(self) -> Tokens:
        _unique((row.feature for row in self.features), "feature")
        _unique((row.feature for row in self.massive_features), "massive feature")
        places: list[Place] = [place for row in self.features for place in row.top]
        places += self.massive or []
        if not self.text and any(p.token is not None or p.before is not None or p.after is not None for p in places):
            raise ValueError("text is false, but there is text")
        return self
