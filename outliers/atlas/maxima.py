"""The largest activations of 27 checkpoints as others published them (arXiv 2605.15572), and ours of the same models.

The published numbers are copied, never computed. They are over more text and more places than a study's `resid`, so that
ours of the same model can only be said to be near them or below; in what a study differs is said with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outliers.atlas.row import AtlasRow

SOURCE = "arXiv 2605.15572"
SAMPLES, TOKENS = 5_000, 17_000_000
"""Texts, and about how many tokens; the paper's runs of 1,000 samples agree within 10%."""
AGREE_WITHIN = 0.1
PLACES = "embedding, attention and MLP outputs, block outputs and the final norm"
BLOCK_OUTPUT, MLP_OUTPUT, FINAL_NORM = "block output", "MLP output", "final norm"


@dataclass(frozen=True)
class PublishedMaximum:
    """One checkpoint: its name on the hub, the largest abs(x), and the 0-based layer of it; None where it is in none.

    `place`: where it was, as far as that is known to this table; None: in one of PLACES.
    """

    model: str
    value: float
    layer: int | None
    place: str | None = None

    @property
    def name(self) -> str:
        """The name without its organisation."""
        return self.model.rpartition("/")[2]

    @property
    def where(self) -> str:
        """Where it was, for a column: `layer 23, MLP output`."""
        return ", ".join(part for part in (None if self.layer is None else f"layer {self.layer}", self.place) if part)


MAXIMA = (
    PublishedMaximum("Qwen/Qwen3-30B-A3B", 1512, 3, BLOCK_OUTPUT),
    PublishedMaximum("Qwen/Qwen3-1.7B", 14208, 25),
    PublishedMaximum("Qwen/Qwen3-8B", 17664, 16),
    PublishedMaximum("Qwen/Qwen3-32B", 35328, 44),
    PublishedMaximum("Qwen/Qwen2.5-1.5B", 7968, 5),
    PublishedMaximum("Qwen/Qwen2.5-1.5B-Instruct", 7968, 5),
    PublishedMaximum("Qwen/Qwen2.5-7B", 13248, 13),
    PublishedMaximum("Qwen/Qwen2.5-7B-Instruct", 13312, 13),
    PublishedMaximum("Qwen/Qwen2.5-32B", 30848, 63),
    PublishedMaximum("Qwen/Qwen2.5-32B-Instruct", 22144, 42),
    PublishedMaximum("Qwen/Qwen2.5-VL-3B-Instruct", 3984, 30),
    PublishedMaximum("Qwen/Qwen2.5-VL-7B-Instruct", 8256, 13),
    PublishedMaximum("Qwen/Qwen2.5-VL-32B-Instruct", 22144, 44),
    PublishedMaximum("Qwen/Qwen3.5-0.8B", 122, None, FINAL_NORM),
    PublishedMaximum("Qwen/Qwen3.5-9B", 956, 31),
    PublishedMaximum("Qwen/Qwen3.5-27B", 1848, 63),
    PublishedMaximum("Qwen/Qwen3.5-35B-A3B", 132, 39),
    PublishedMaximum("google/gemma-2b", 2992, 11),
    PublishedMaximum("google/gemma-2-9b", 1664, 41),
    PublishedMaximum("google/gemma-2-27b", 157696, 38),
    PublishedMaximum("google/gemma-3-4b-it", 245760, 29),
    PublishedMaximum("google/gemma-3-27b-it", 696320, 46),
    PublishedMaximum("openai/gpt-oss-20b", 145408, 23, MLP_OUTPUT),
    PublishedMaximum("inclusionAI/Ling-mini-base-2.0-5T", 7648, 14),
    PublishedMaximum("inclusionAI/Ling-mini-base-2.0-10T", 9024, 10),
    PublishedMaximum("inclusionAI/Ling-mini-base-2.0-15T", 10112, 19),
    PublishedMaximum("inclusionAI/Ling-mini-base-2.0-20T", 11776, 19),
)
"""Names on the hub of the paper's checkpoints; of the three Qwen2.5-VL the ones that the hub has, which are Instruct."""

_BY_MODEL = {row.model.lower(): row for row in MAXIMA}


def published_maximum(model_id: str) -> PublishedMaximum | None:
    """The published row of the model with this name on the hub, letters of any case; None without one."""
    return _BY_MODEL.get(model_id.lower())


def maxima_rows(rows: Sequence[AtlasRow]) -> list[dict[str, Any]]:
    """The published maxima, those with studies here first, each with those that read `resid`, one a capture."""
    own: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        known = published_maximum(row.model)
        if known is not None and row.resid_max is not None:
            found = {"value": row.resid_max, "layer": row.resid_max_layer, "study_id": row.study_id}
            kept = own.setdefault(known.model, {})
            kept.setdefault((row.capture_id, row.resid_max), found | {"differs": _differs(row, known), "row": row})
    listed = [{"known": known, "studies": list(own.get(known.model, {}).values())} for known in MAXIMA]
    return sorted(listed, key=lambda item: not item["studies"])


def _differs(row: AtlasRow, known: PublishedMaximum) -> str:
    """In what a study is not as the published run, in a sentence."""
    share = row.num_tokens / TOKENS
    size = f"{row.num_tokens:,} tokens of {row.corpus}, {_times(share)} of the published run's text"
    said = [size, *([f"layers {row.layers}"] if row.layers else []), row.dtype]
    said += [row.quantization] if row.quantization else []
    where = (
        ""
        if known.place in (None, BLOCK_OUTPUT)
        else f"; the published one is of the {known.place}, which no study reads"
    )
    return f"{', '.join(said)}; block outputs alone{where}"


def _times(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 1 else f"{share:.2g} times"


def nearness(ours: float, published: float) -> str:
    """Ours as a share of the published value, for a column: `98%`."""
    return f"{100 * ours / published:.3g}%"


def missing(listed: Iterable[Mapping[str, Any]]) -> int:
    """How many of the published models have no study here."""
    return sum(not item["studies"] for item in listed)
