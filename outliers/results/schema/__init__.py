"""The exact form of what a study gives: summary.json, tokens.json, features.parquet, quantization.parquet. Each is described
once.

The writer builds these models. The boundary of publishing validates by them, and checks that the parts of a summary agree
(`StudySummary.check_consistent`). Readers validate by the same models with `extra="ignore"`. Arrow schemas and the tables of
docs/results.md are made from them. They are strict: unknown keys, wrong types and lists longer than their meaning allows are
errors, so that nothing but a study's numbers fits in. A newcomer adds a key here, with its description, and then writes it.
"""

from outliers.results.schema.advice import Advice, Cause, FormatVerdict, Place, Repair
from outliers.results.schema.blocks import (
    CorpusBlock,
    CriteriaBlock,
    FeatureRow,
    IntervalBlock,
    Legacy,
    ModelBlock,
    Readings,
)
from outliers.results.schema.features import (
    EARLIER_FEATURES_SCHEMA,
    FEATURES_SCHEMA,
    MOMENT_COLUMNS,
    NULLABLE_COLUMNS,
    FeatureRecord,
)
from outliers.results.schema.fields import MAX_MAGNITUDES, first_error
from outliers.results.schema.layers import (
    DeviationLadder,
    Histogram,
    IntervalCounts,
    LayerRow,
    MassiveRow,
    Perplexity,
    Sweep,
)
from outliers.results.schema.probes import (
    SENSITIVITY_SCHEMA,
    Change,
    Gate,
    Gates,
    Probes,
    Reference,
    SensitivityRecord,
    SuperWeight,
)
from outliers.results.schema.quantization import (
    QUANTIZATION_NULLABLE,
    QUANTIZATION_SCHEMA,
    RANGES,
    QuantizationBlock,
    QuantizationRecord,
)
from outliers.results.schema.summary import StudySummary
from outliers.results.schema.tokens import (
    MassiveFeature,
    MassiveToken,
    Positions,
    TokenFeature,
    Tokens,
    TopToken,
)

__all__ = [
    "EARLIER_FEATURES_SCHEMA",
    "FEATURES_SCHEMA",
    "MAX_MAGNITUDES",
    "MOMENT_COLUMNS",
    "NULLABLE_COLUMNS",
    "QUANTIZATION_NULLABLE",
    "QUANTIZATION_SCHEMA",
    "RANGES",
    "SENSITIVITY_SCHEMA",
    "Advice",
    "Cause",
    "Change",
    "CorpusBlock",
    "CriteriaBlock",
    "DeviationLadder",
    "FeatureRecord",
    "FeatureRow",
    "FormatVerdict",
    "Gate",
    "Gates",
    "Histogram",
    "IntervalBlock",
    "IntervalCounts",
    "LayerRow",
    "Legacy",
    "MassiveFeature",
    "MassiveRow",
    "MassiveToken",
    "ModelBlock",
    "Perplexity",
    "Place",
    "Positions",
    "Probes",
    "QuantizationBlock",
    "QuantizationRecord",
    "Readings",
    "Reference",
    "Repair",
    "SensitivityRecord",
    "StudySummary",
    "SuperWeight",
    "Sweep",
    "TokenFeature",
    "Tokens",
    "TopToken",
    "first_error",
]
