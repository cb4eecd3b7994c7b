"""summary.json: the answer of a study in numbers. Writer and readers share this description."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field

from outliers.results.schema.blocks import CorpusBlock, CriteriaBlock, FeatureList, ModelBlock, Readings
from outliers.results.schema.experts import ExpertsBlock
from outliers.results.schema.fields import (
    MAX_LAYERS,
    MAX_MASSIVE,
    MAX_QUANTILES,
    Count,
    Digest,
    FeatureNumbers,
    Note,
    Share,
    Strict,
    check_unique,
)
from outliers.results.schema.layers import (
    DeviationLadder,
    Histogram,
    IntervalCounts,
    LayerRow,
    MassiveRow,
    Perplexity,
    Sweep,
)
from outliers.results.schema.quantization import QuantizationBlock
from outliers.spec import BLOCK, AnySiteName, ReadingName

MassiveList = Annotated[list[MassiveRow], Field(max_length=MAX_MASSIVE)]


class StudySummary(Strict):
    """summary.json, schema_version 1.

    A field with a default is absent from studies that were made before it was counted; `perplexity` and `quantization`
    also where they were not asked for, and `experts` where the model has none.
    """

    schema_version: Literal[1] = Field(description="1")
    study_id: Digest = Field(description="see design.md")
    capture_id: Digest = Field(description="see design.md")
    model: ModelBlock = Field(description="the model that was read")
    corpus: CorpusBlock = Field(description="the tokens that it read")
    criteria: CriteriaBlock = Field(description="what counts as a systematic feature")
    readings: dict[AnySiteName, Readings] = Field(
        description="the lists of each captured site and of `block`. All but the deciding one end after 256 features, and "
        "after 16 where half of the site's features or more pass"
    )
    systematic: FeatureList = Field(
        description="the answer: the list of the deciding reading and site, by `max_magnitude`, then `feature`"
    )
    layers: Annotated[list[LayerRow], Field(max_length=5 * MAX_LAYERS)] = Field(
        description="one row for each captured site and layer"
    )
    massive: MassiveList | None = Field(
        description="the largest 1,000 massive activations at `resid`; null where `resid` was not captured"
    )
    massive_count: Count | None = Field(description="how many massive activations there are")
    sweep: Sweep = Field(description="number of features at each magnitude of the ladder")
    histogram: dict[AnySiteName, Histogram] = Field(description="values by magnitude, for each captured site")
    notes: Annotated[list[Note], Field(max_length=100)] = Field(description="what a reader must know of these numbers")
    perplexity: Perplexity | None = Field(None, description="only with `--perplexity`")
    reading_counts: dict[AnySiteName, dict[ReadingName | Literal["legacy"], Count]] = Field(
        {}, description="how many features each list of `readings` has, uncut"
    )
    without_first_tokens: dict[AnySiteName, dict[ReadingName, FeatureNumbers]] = Field(
        {},
        description="by site and reading, the features that pass where the first token of every sequence is left out",
    )
    intervals: IntervalCounts | None = Field(
        None, description="ranges over resamples of the sequences; null for one sequence"
    )
    massive_by_token: MassiveList | None = Field(
        None, description="`massive` with the token's own median in the place of the layer's; the largest 200"
    )
    massive_by_token_count: Count | None = Field(None, description="how many of these there are")
    massive_undecided: Count | None = Field(
        None,
        description="values in neither list, since merged summaries of float32 only bound the median of their layer; else 0",
    )
    sd_ladder: DeviationLadder | None = Field(
        None, description="number of features at multiples of a layer's standard deviation"
    )
    quantile_levels: Annotated[list[Share], Field(max_length=MAX_QUANTILES)] = Field(
        [], description="levels of `layers[].quantiles`"
    )
    quantization: QuantizationBlock | None = Field(None, description="only with `--formats`")
    experts: ExpertsBlock | None = Field(None, description="only of a mixture of experts, without `--experts off`")

    def check_consistent(self) -> None:
        """Raise ValueError where parts contradict each other. The boundary of publishing calls this; a reader need not."""
        check_unique((row.feature for row in self.systematic), "systematic feature")
        check_unique(((row.site, row.layer) for row in self.layers), "layer")
        beyond = [row.layer for row in self.layers if row.layer >= self.model.num_layers]
        if beyond:
            raise ValueError(f"layer {beyond[0]} of a model with {self.model.num_layers} layers")
        self._check_features()
        self._check_experts()
        for site, readings in self.readings.items():
            for rows in readings.lists.values():
                check_unique((row.feature for row in rows), f"at {site}, feature")
            if site != BLOCK and readings.legacy is not None:
                raise ValueError(f"the reading legacy stands at block only, not at {site}")

    def _check_features(self) -> None:
        """Raise ValueError for a listed feature or layer that the model does not have or that was not read."""
        layers, width = {row.layer for row in self.layers}, self.max_width
        lists = [self.systematic]
        for own in self.readings.values():
            lists += [*own.lists.values(), *([own.legacy.features] if own.legacy else [])]
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

    def _check_experts(self) -> None:
        """Raise ValueError where the experts are not those of the model and corpus, or give what is not there."""
        if (found := self.experts) is None:
            return
        layers, corpus, hidden = {row.layer for row in self.layers}, self.corpus, self.model.hidden_size
        if not layers.issuperset(found.layers):
            raise ValueError("experts of a layer that was not read")
        if found.experts != self.model.num_experts or found.slots > found.experts:
            raise ValueError(
                f"{found.slots} of {found.experts} experts a token, the model has {self.model.num_experts}"
            )
        placed = [(row.sequence, row.position, row.feature) for row in found.massive or ()]
        largest = [found.largest_output] if found.largest_output else []
        listed = found.super_experts.experts if found.super_experts else []
        # mypy gives rows of two classes the class that both extend, which has no places
        placed += [(row.sequence, row.position, row.channel) for row in (*listed, *largest)]  # type: ignore[misc]
        for sequence, position, channel in placed:
            if sequence is None or not sequence < corpus.num_sequences or not position < corpus.sequence_length:
                raise ValueError(f"an expert's output at position {position} of sequence {sequence}, not in the corpus")
            if channel is None or channel >= hidden:
                raise ValueError(f"an expert's output at channel {channel} of {hidden}")
        passing = {row.feature for row in self.systematic}
        if any(row.feature not in passing for row in found.attribution or ()):
            raise ValueError("a feature is attributed to experts that is not systematic")
        if any(not {row.first_layer, row.last_layer} <= layers for row in found.massive or ()):
            raise ValueError("massive activations of a layer that was not read are attributed to experts")
        if any(kind.tokens > corpus.num_tokens for kind in found.kinds):
            raise ValueError("more tokens of a kind than the corpus has")

    @property
    def max_width(self) -> int:
        """Most features a site can have: o_in is wider than the hidden size (3 x at GLM-4.5-Air), down_in too (8 x at Gemma 2B),
        never 16 times."""
        return 16 * self.model.hidden_size

    @property
    def max_rows(self) -> int:
        """Most rows features.parquet can have: every captured (site, layer), and block's, in full width."""
        sites = len(self.readings) or 5
        return sites * self.model.num_layers * self.max_width
