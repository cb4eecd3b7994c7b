"""One published study as a row of the atlas.

`row_of` takes what its manifest and its summary.json say, and counts nothing again. It knows no other study. Before it:
`published_summary`. After it: `atlas`, `compare`.

A field of Row is a column of atlas.parquet:

    url, study_id, capture_id, results_digest   where it is published, and what it is; strings
    label                                       of the study, null without
    model, revision, architecture, dtype, quantization
    total_parameters, active_parameters, num_experts     int64, null where unknown
    num_layers, layers_read, hidden_size        int32; layer fractions are of layers_read
    layers                                      which were read, such as "0-4,9 of 28" (null: all)
    site_modules                                where the deciding site was named by hand, such as
                                                "mlp_in=layers.*.mlp:input" (null: nowhere, or an older study)
    corpus, corpus_options, token_sha256        source; what of its options is not the default, such as "subset sample-10BT"
                                                (null: all are, or an older study); sha256 of the token ids
    num_sequences, sequence_length, num_tokens  int64
    reading, site, sites                        what decides, and the list of what was captured
    magnitude, min_layer_fraction, min_position_fraction  the criteria; float64
    num_features                                systematic features: int64, with num_features_low and _high, the ends of the
                                                range over resamples of its sequences (null: one sequence, or an older study)
    layer_fraction, position_fraction           mean over the systematic features (null: none, or the reading has none), with
                                                position_fraction_low and _high: the means of the features' own ends.
                                                layer_fraction_low and _high are null: a share of layers has no interval
    share_ends                                  what the ends of shares of tokens are: "95% interval", "range over sequences"
                                                (few sequences), or "range over resamples" (an older study); null without
    interval_level                              0.95 where they are a 95% interval, else null
    max_magnitude                               the largest of a systematic feature
    massive_count                               values at resid that are massive; null where resid was not captured
    perplexity, perplexity_tokens               null where not measured
    legacy_pairs, legacy_features               the earlier pipeline's way of counting; null where block was not captured
    legacy_layer_fraction, legacy_position_fraction      means over the pairs; null where summary.json lists not all
    features                                    list of structs, largest first: feature, layer_fraction, _low, _high (null),
                                                position_fraction, _low, _high, passes, hits, max_magnitude

Every fraction is a share of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from outliers.atlas.read import FoundFeature, FoundSummary, read_found
from outliers.publish.shelf import Published
from outliers.results.intervals import BEFORE
from outliers.spec import BLOCK, BLOCK_SITES, CorpusSpec
from outliers.untrusted.visible import visible_values

INTERVAL_LEVEL = 0.95
MAX_LABEL = 300
"""Characters of a label that are taken from a manifest, which says of it what it likes."""
CORPUS_OPTIONS = ("subset", "split", "corpus_revision", "seed", "bos", "packing")
"""Fields of a CorpusSpec that make another corpus of the same source and size."""


class Conditions(NamedTuple):
    """What a number depends on beside the criteria: four of the corpus, two of the arithmetic, two of the reading places."""

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


@dataclass(frozen=True)
class Row:
    """One study; a field is a column of atlas.parquet, which the module's docstring describes.

    In its strings every character that acts on a terminal is an escape.
    """

    url: str
    study_id: str
    capture_id: str
    results_digest: str
    label: str | None
    model: str
    revision: str | None
    architecture: str
    dtype: str
    quantization: str | None
    total_parameters: int | None
    active_parameters: int | None
    num_experts: int | None
    num_layers: int
    layers_read: int
    layers: str | None
    site_modules: str | None
    hidden_size: int
    corpus: str
    corpus_options: str | None
    token_sha256: str
    num_sequences: int
    sequence_length: int
    num_tokens: int
    reading: str
    site: str
    sites: tuple[str, ...]
    magnitude: float
    min_layer_fraction: float
    min_position_fraction: float
    num_features: int
    num_features_low: int | None
    num_features_high: int | None
    layer_fraction: float | None
    layer_fraction_low: float | None
    layer_fraction_high: float | None
    position_fraction: float | None
    position_fraction_low: float | None
    position_fraction_high: float | None
    share_ends: str | None
    interval_level: float | None
    max_magnitude: float | None
    massive_count: int | None
    perplexity: float | None
    perplexity_tokens: int | None
    legacy_pairs: int | None
    legacy_features: int | None
    legacy_layer_fraction: float | None
    legacy_position_fraction: float | None
    features: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str):
                object.__setattr__(self, name, visible_values(value))

    @property
    def criteria(self) -> tuple[str, str, float, float, float]:
        """What has to be identical before two numbers of features are compared."""
        return self.reading, self.site, self.magnitude, self.min_layer_fraction, self.min_position_fraction

    @property
    def conditions(self) -> Conditions:
        """What else the number depends on: the corpus, the arithmetic, and where in the model it was read."""
        read = (self.corpus, self.num_sequences, self.sequence_length, self.corpus_options)
        return Conditions(*read, self.dtype, self.quantization, self.layers, self.site_modules)


def row_of(study: Published) -> Row:
    """The row of a study that was read with its summary.json. Raises PublishRefused."""
    found = read_found(study)
    model, corpus, rule = found.model, found.corpus, found.criteria
    drawn = found.intervals
    low, high = (None, None) if drawn is None else drawn.counts.get(rule.site, {}).get(rule.reading, (None, None))
    shares = None if drawn is None else drawn.shares or BEFORE
    features = tuple(_feature(item) for item in found.systematic)
    label = study.manifest["spec"].get("label")
    read = sorted({item.layer for item in found.layers})
    return Row(
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
        max_magnitude=max((item["max_magnitude"] for item in features), default=None),
        massive_count=found.massive_count,
        perplexity=None if found.perplexity is None else found.perplexity.value,
        perplexity_tokens=None if found.perplexity is None else found.perplexity.tokens,
        **_legacy(found),
        features=features,
    )


def _options(asked: Any) -> str | None:
    """Which part of a source was read, and how it was cut, where that is not the default: two of one source are not alike."""
    if not isinstance(asked, Mapping):
        return None
    said = [
        f"{name} {asked[name]}"
        for name in CORPUS_OPTIONS
        if isinstance(asked.get(name), str | int) and asked[name] != CorpusSpec.model_fields[name].default
    ]
    return ", ".join(said) or None


def _part_of_layers(read: Sequence[int], num_layers: int) -> str | None:
    """Which layers were read, where not all were: `0-4,9 of 28`."""
    if not read or len(read) == num_layers:
        return None
    runs: list[list[int]] = []
    for layer in read:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return f"{','.join('-'.join(map(str, run)) for run in runs)} of {num_layers}"


def _named_modules(asked: Any, site: str) -> str | None:
    """Where the sites that the answer is of were named by hand: another place than the family's may be another tensor."""
    named = asked.get("site_modules") if isinstance(asked, Mapping) else None
    if not isinstance(named, list):
        return None
    own = BLOCK_SITES if site == BLOCK else (site,)
    return ", ".join(sorted(str(item) for item in named if str(item).partition("=")[0] in own)) or None


def _feature(item: FoundFeature) -> dict[str, Any]:
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


def _mean_spans(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the features of both fractions and of the ends beside them."""
    names = [f"{side}{end}" for side in ("layer_fraction", "position_fraction") for end in ("", "_low", "_high")]
    return {name: _mean([item[name] for item in features]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _legacy(found: FoundSummary) -> dict[str, Any]:
    block = found.readings.get(BLOCK)
    if block is None or block.legacy is None:
        names = ("legacy_pairs", "legacy_features", "legacy_layer_fraction", "legacy_position_fraction")
        return dict.fromkeys(names)
    pairs, listed = block.legacy.feature_sequence_pairs, block.legacy.features
    # the list may be cut: a mean over a part is no mean over the pairs
    whole = pairs > 0 and sum(item.sequences for item in listed) == pairs
    tokens = [item.position_fraction for item in listed if item.position_fraction is not None]
    return {
        "legacy_pairs": pairs,
        "legacy_features": found.reading_counts.get(BLOCK, {}).get("legacy", len(listed)),
        "legacy_layer_fraction": _over_pairs(listed, [item.layer_fraction for item in listed]) if whole else None,
        "legacy_position_fraction": _over_pairs(listed, tokens) if whole and len(tokens) == len(listed) else None,
    }


def _over_pairs(listed: Sequence[FoundFeature], shares: Sequence[float]) -> float:
    """The mean of a share over the feature-sequence pairs; each feature's is a mean over its own sequences already."""
    weighed = (share * item.sequences for item, share in zip(listed, shares, strict=True))
    return math.fsum(weighed) / sum(item.sequences for item in listed)
