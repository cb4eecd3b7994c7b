"""One published study as a row of the atlas, described once: `AtlasRow`.

`row_of` takes what its manifest and its summary.json say, and counts nothing again. It knows no other study. Every fraction is
a share of 1. The Arrow schema of atlas.parquet and its table in docs/results.md are made from the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import TypedDict

from outliers.atlas.read import read_summary
from outliers.atlas.verdict import verdict_columns
from outliers.publish.allowlist import REPORT
from outliers.publish.shelf import Published
from outliers.results.intervals import BEFORE
from outliers.results.schema import ExpertsBlock, FeatureRow, StudySummary
from outliers.results.schema.arrow import Int32
from outliers.spec import BLOCK, BLOCK_SITES, CorpusSpec, public_name
from outliers.units import format_ranges
from outliers.untrusted.visible import visible_values

INTERVAL_LEVEL = 0.95
MAX_LABEL = 300
"""Characters of a label that are taken from a manifest, which is untrusted."""
CORPUS_OPTIONS = ("subset", "split", "corpus_revision", "seed", "bos", "packing")
"""Fields of a CorpusSpec that make another corpus of the same source and size."""


class Conditions(NamedTuple):
    """What a number depends on in addition to the criteria: corpus (4 fields), arithmetic (2), where it was read (2)."""

    corpus: str
    num_sequences: int
    sequence_length: int
    corpus_options: str | None
    dtype: str
    quantization: str | None
    layers: str | None
    site_modules: str | None

    @property
    def read(self) -> tuple[Any, ...]:
        """The corpus."""
        return self[:4]

    @property
    def arithmetic(self) -> tuple[Any, ...]:
        """dtype and quantization."""
        return self[4:6]

    @property
    def places(self) -> tuple[Any, ...]:
        """Where in the model it was read: layers and modules."""
        return self[6:]


class AtlasFeature(TypedDict):
    """One systematic feature of a study; a field of the structs in the column `features`."""

    feature: Annotated[int, pa.int32(), Field(description="its number, 0-based")]
    layer_fraction: Annotated[float, Field(description="share of the layers")]
    layer_fraction_low: Annotated[float | None, Field(description="null: a share of layers has no interval")]
    layer_fraction_high: Annotated[float | None, Field(description="null")]
    position_fraction: Annotated[float | None, Field(description="share of the tokens; null for `per_layer`")]
    position_fraction_low: Annotated[float | None, Field(description="the low end of it, see `share_ends`")]
    position_fraction_high: Annotated[float | None, Field(description="the high end")]
    passes: Annotated[float | None, Field(description="share of the resamples in which it passes")]
    hits: Annotated[int, Field(description="values with abs(x) >= magnitude")]
    max_magnitude: Annotated[float, Field(description="largest abs(x)")]


class AtlasRow(BaseModel):
    """One study: a row of atlas.parquet, and each field a column of it.

    In its strings every character that acts on a terminal is an escape.
    """

    model_config = ConfigDict(frozen=True)

    url: str = Field(description="where it is published")
    study_id: str = Field(description="as in summary.json")
    capture_id: str = Field(description="as in summary.json")
    results_digest: str = Field(description="as in manifest.json")
    label: str | None = Field(description="of the study; null without one")
    model: str = Field(description="summary.json's `model.id`")
    revision: str | None = Field(description="of the model")
    architecture: str = Field(description="of the model")
    dtype: str = Field(description="of the model")
    quantization: str | None = Field(description="of the model")
    total_parameters: int | None = Field(description="null where unknown")
    active_parameters: int | None = Field(description="null where unknown")
    num_experts: int | None = Field(description="null: dense")
    num_layers: Int32 = Field(description="layers of the model")
    layers_read: Int32 = Field(description="layers that were read; shares of layers are of these")
    layers: str | None = Field(description="which were read, such as `0-4,9 of 28`; null: all")
    site_modules: str | None = Field(
        description="where the deciding site was named by hand, such as `mlp_in=layers.*.mlp:input`; null: nowhere, or an "
        "older study"
    )
    hidden_size: Int32 = Field(description="of the model")
    corpus: str = Field(description="summary.json's `corpus.source`")
    corpus_options: str | None = Field(
        description="options of the corpus that are not the default, such as `subset sample-10BT`; null: none, or an older "
        "study"
    )
    token_sha256: str = Field(description="of the corpus")
    num_sequences: int = Field(description="of the corpus")
    sequence_length: int = Field(description="of the corpus")
    num_tokens: int = Field(description="of the corpus")
    reading: str = Field(description="the reading that decides")
    site: str = Field(description="the site that decides")
    sites: tuple[str, ...] = Field(description="captured sites")
    magnitude: float = Field(description="a hit is abs(x) >= this")
    min_layer_fraction: float = Field(description="least share of layers")
    min_position_fraction: float = Field(description="least share of tokens")
    num_features: int = Field(description="systematic features")
    num_features_low: int | None = Field(
        description="the low end of their range over resamples of the sequences; null: one sequence, or an older study"
    )
    num_features_high: int | None = Field(description="the high end")
    layer_fraction: float | None = Field(description="mean over the systematic features; null without any")
    layer_fraction_low: float | None = Field(description="null: a share of layers has no interval")
    layer_fraction_high: float | None = Field(description="null")
    position_fraction: float | None = Field(
        description="mean over the systematic features; null without any, and for `per_layer`"
    )
    position_fraction_low: float | None = Field(description="mean of the features' own low ends")
    position_fraction_high: float | None = Field(description="mean of the high ends")
    share_ends: str | None = Field(
        description="what the ends of shares of tokens are: `95% interval`, `range over sequences` (few sequences), or "
        "`range over resamples` (an older study); null without"
    )
    interval_level: float | None = Field(description="0.95 where they are a 95% interval, else null")
    max_magnitude: float | None = Field(description="largest of a systematic feature")
    massive_count: int | None = Field(description="massive activations; null where `resid` was not captured")
    resid_max: float | None = Field(
        None, description="largest abs(x) at `resid` in any layer that was read; null where that was not captured"
    )
    resid_max_layer: Int32 | None = Field(None, description="the first layer that has it, 0-based")
    perplexity: float | None = Field(description="null where not measured")
    perplexity_tokens: int | None = Field(description="tokens that were predicted; null where not measured")
    legacy_pairs: int | None = Field(
        description="feature-sequence pairs of the earlier pipeline's way of counting; null where `block` was not captured"
    )
    legacy_features: int | None = Field(description="features of these pairs")
    legacy_layer_fraction: float | None = Field(
        description="mean over the pairs; null where summary.json lists not all of them"
    )
    legacy_position_fraction: float | None = Field(description="the same")
    probe_id: str | None = Field(None, description="of the probe that the next columns are of; null: not probed")
    best_format: str | None = Field(
        None,
        description="of the formats within the budget, activations quantized, the one with the fewest bits, then the least KL; "
        "null: none, or not probed",
    )
    budget: float | None = Field(None, description="that budget, as KL in nats a token; null: not probed")
    int8_kl: float | None = Field(None, description="KL of int8_token at all captured sites; null: not probed")
    nvfp4_kl: float | None = Field(None, description="KL of nvfp4; null: not probed")
    perplexity_without_features: float | None = Field(
        None, description="perplexity with the systematic features set to zero; null: not probed"
    )
    experts_unreached: float | None = Field(
        None, description="share of the routed experts that no token reached; null: dense, or experts were not read"
    )
    super_experts: int | None = Field(None, description="super experts over all tokens; null: unknown, or as above")
    largest_expert_output: float | None = Field(
        None, description="largest abs(x) of a routed expert's output; null: unknown, or as above"
    )
    report: str | None = Field(None, description="where its page is published")
    features: tuple[AtlasFeature, ...] = Field(description="the systematic features, largest first (below)")
    model_name: str | None = Field(
        None, description="what its owner calls the model (`--model-name`); null: nothing else"
    )
    corpus_name: str | None = Field(None, description="what he calls the corpus (`--corpus-name`)")

    @property
    def model_called(self) -> str:
        """What the model is called where it is published."""
        return self.model_name or public_name(self.model)

    @field_validator("*", mode="after")
    @classmethod
    def _escaped(cls, value: Any) -> Any:
        return visible_values(value) if isinstance(value, str) else value

    @property
    def criteria(self) -> tuple[str, str, float, float, float]:
        """What has to be identical before two numbers of features are compared."""
        return self.reading, self.site, self.magnitude, self.min_layer_fraction, self.min_position_fraction

    @property
    def conditions(self) -> Conditions:
        """What else the number depends on: the corpus, the arithmetic, and where in the model it was read."""
        read = (self.corpus, self.num_sequences, self.sequence_length, self.corpus_options)
        return Conditions(*read, self.dtype, self.quantization, self.layers, self.site_modules)


def row_of(study: Published) -> AtlasRow:
    """The row of a study that was read with its summary.json. Raises PublishRefused."""
    found = read_summary(study)
    model, corpus, rule = found.model, found.corpus, found.criteria
    drawn = found.intervals
    low, high = (None, None) if drawn is None else drawn.counts.get(rule.site, {}).get(rule.reading, (None, None))
    shares = None if drawn is None else drawn.shares or BEFORE
    features = tuple(_feature(item) for item in found.systematic)
    label = study.manifest["spec"].get("label")
    read = sorted({item.layer for item in found.layers})
    return AtlasRow(
        url=study.url,
        study_id=found.study_id,
        capture_id=found.capture_id,
        results_digest=study.manifest["results_digest"],
        label=label[:MAX_LABEL] if isinstance(label, str) else None,
        model=model.id,
        revision=model.revision,
        architecture=model.architecture,
        dtype=model.dtype,
        quantization=model.quantization,
        total_parameters=model.total_parameters,
        active_parameters=model.active_parameters,
        num_experts=model.num_experts,
        num_layers=model.num_layers,
        layers_read=len(read) or model.num_layers,
        layers=_part_of_layers(read, model.num_layers),
        site_modules=_named_modules(study.manifest["spec"].get("capture"), rule.site),
        hidden_size=model.hidden_size,
        corpus=corpus.source,
        corpus_options=_options(study.manifest["spec"].get("corpus")),
        token_sha256=corpus.token_sha256,
        num_sequences=corpus.num_sequences,
        sequence_length=corpus.sequence_length,
        num_tokens=corpus.num_tokens,
        reading=rule.reading,
        site=rule.site,
        sites=tuple(rule.sites),
        magnitude=rule.magnitude,
        min_layer_fraction=rule.layer_fraction,
        min_position_fraction=rule.position_fraction,
        num_features=len(features),
        num_features_low=low,
        num_features_high=high,
        **_mean_spans(features),
        share_ends=shares,
        interval_level=INTERVAL_LEVEL if shares == "95% interval" else None,
        model_name=model.name,
        corpus_name=corpus.name,
        max_magnitude=max((item["max_magnitude"] for item in features), default=None),
        massive_count=found.massive_count,
        **_largest_resid(found),
        perplexity=None if found.perplexity is None else found.perplexity.value,
        perplexity_tokens=None if found.perplexity is None else found.perplexity.tokens,
        **_legacy(found),
        **verdict_columns(study.verdicts, found.study_id),
        **_experts(found.experts),
        report=_report(study),
        features=features,
    )


def _largest_resid(found: StudySummary) -> dict[str, Any]:
    """The largest abs(x) at `resid`, whatever counts as massive."""
    values = [(-row.max_magnitude, row.layer) for row in found.layers if row.site == "resid" and row.max_magnitude]
    if not values:
        return {}
    largest, layer = min(values)
    return {"resid_max": -largest, "resid_max_layer": layer}


def _report(study: Published) -> str | None:
    """The URL of the study's page; None where its manifest names none."""
    named = any(file["path"] == REPORT for file in study.manifest["files"])
    return f"{study.url}/{study.manifest['folder']}/{REPORT}" if named else None


def _experts(found: ExpertsBlock | None) -> dict[str, Any]:
    if found is None:
        return {}
    largest = found.largest_output
    return {
        "experts_unreached": found.never_reached,
        "super_experts": None if found.super_experts is None else found.super_experts.count,
        "largest_expert_output": None if largest is None else largest.output,
    }


def _options(asked: Any) -> str | None:
    """Which part of a source was read, and how it was cut, where that is not the default: two of one source are not alike."""
    if not isinstance(asked, Mapping):
        return None
    options = [
        f"{name} {asked[name]}"
        for name in CORPUS_OPTIONS
        if isinstance(asked.get(name), str | int) and asked[name] != CorpusSpec.model_fields[name].default
    ]
    return ", ".join(options) or None


def _part_of_layers(read: Sequence[int], num_layers: int) -> str | None:
    """Which layers were read, where not all were: `0-4,9 of 28`."""
    if not read or len(read) == num_layers:
        return None
    return f"{format_ranges(read, ',')} of {num_layers}"


def _named_modules(asked: Any, site: str) -> str | None:
    """Where the sites that the answer is of were named by hand: another place than the family's may be another tensor."""
    named = asked.get("site_modules") if isinstance(asked, Mapping) else None
    if not isinstance(named, list):
        return None
    own = BLOCK_SITES if site == BLOCK else (site,)
    return ", ".join(sorted(str(item) for item in named if str(item).partition("=")[0] in own)) or None


def _feature(item: FeatureRow) -> AtlasFeature:
    interval = item.interval
    tokens = (None, None) if interval is None or interval.position_fraction is None else interval.position_fraction
    return {
        "feature": item.feature,
        "layer_fraction": item.layer_fraction,
        # only older studies have ends of it, percentiles of what more tokens only add to
        "layer_fraction_low": None,
        "layer_fraction_high": None,
        "position_fraction": item.position_fraction,
        "position_fraction_low": tokens[0],
        "position_fraction_high": tokens[1],
        "passes": None if interval is None else interval.passes,
        "hits": item.hits,
        "max_magnitude": item.max_magnitude,
    }


def _mean_spans(features: Sequence[AtlasFeature]) -> dict[str, Any]:
    """Means over the features of both fractions and of their ends."""
    names = [f"{side}{end}" for side in ("layer_fraction", "position_fraction") for end in ("", "_low", "_high")]
    plain: list[Mapping[str, Any]] = [dict(item) for item in features]
    return {name: _mean([item[name] for item in plain]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _legacy(found: StudySummary) -> dict[str, Any]:
    block = found.readings.get(BLOCK)
    if block is None or block.legacy is None:
        names = ("legacy_pairs", "legacy_features", "legacy_layer_fraction", "legacy_position_fraction")
        return dict.fromkeys(names)
    pairs, listed = block.legacy.feature_sequence_pairs, block.legacy.features
    # the list may be cut: a mean over a part of it is not the mean over the pairs
    whole = pairs > 0 and sum(item.sequences for item in listed) == pairs
    tokens = [item.position_fraction for item in listed if item.position_fraction is not None]
    return {
        "legacy_pairs": pairs,
        "legacy_features": found.reading_counts.get(BLOCK, {}).get("legacy", len(listed)),
        "legacy_layer_fraction": _over_pairs(listed, [item.layer_fraction for item in listed]) if whole else None,
        "legacy_position_fraction": _over_pairs(listed, tokens) if whole and len(tokens) == len(listed) else None,
    }


def _over_pairs(listed: Sequence[FeatureRow], shares: Sequence[float]) -> float:
    """The mean of a share over the feature-sequence pairs; each feature's is a mean over its own sequences already."""
    weighed = (share * item.sequences for item, share in zip(listed, shares, strict=True))
    return math.fsum(weighed) / sum(item.sequences for item in listed)
