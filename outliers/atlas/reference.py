"""Numbers that others published, against which an atlas is read: LLM.int8()'s table and the earlier pipeline's counts.

They are copied, never computed, each with its source, and hold under their own conditions alone.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER_RULE = (6.0, 0.25, 0.06)
"""magnitude, layer_fraction, position_fraction of both: LLM.int8() (arXiv 2208.07339), section 4.1."""
EARLIER_SEQUENCES, EARLIER_LENGTH = 16, 2048
EARLIER_CORPUS = "FineWeb-Edu"


@dataclass(frozen=True)
class PaperModel:
    """A row of LLM.int8()'s Table 4: parameters by the model's name, perplexity on C4, shares of layers and of tokens."""

    model: str
    parameters: int
    perplexity: float
    num_features: int
    one_sided: int
    layer_fraction: float
    position_fraction: float


PAPER = (
    PaperModel("GPT2-117M", 117_000_000, 33.5, 1, 1, 0.25, 0.06),
    PaperModel("GPT2-345M", 345_000_000, 26.0, 2, 1, 0.29, 0.18),
    PaperModel("FSEQ-125M", 125_000_000, 25.7, 2, 2, 0.25, 0.22),
    PaperModel("GPT2-762M", 762_000_000, 22.6, 2, 0, 0.31, 0.16),
    PaperModel("GPT2-1.5B", 1_500_000_000, 21.0, 2, 1, 0.41, 0.35),
    PaperModel("FSEQ-1.3B", 1_300_000_000, 15.9, 4, 3, 0.64, 0.47),
    PaperModel("FSEQ-2.7B", 2_700_000_000, 14.4, 5, 5, 0.52, 0.18),
    PaperModel("GPT-J-6B", 6_000_000_000, 13.8, 6, 6, 0.62, 0.28),
    PaperModel("FSEQ-6.7B", 6_700_000_000, 13.3, 6, 6, 1.0, 0.75),
    PaperModel("FSEQ-13B", 13_000_000_000, 12.5, 7, 6, 1.0, 0.73),
)
"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), Table 4; all dense, so total and active parameters are one."""


@dataclass(frozen=True)
class EarlierModel:
    """One model of the earlier pipeline: parameters in billions, by the model's card or name.

    `also`: names of the hub that its name may stand for, where none has just that name.
    """

    model: str
    total_billions: float
    active_billions: float
    pairs: int
    layer_fraction: float
    position_fraction: float
    also: tuple[str, ...] = ()


EARLIER = (
    EarlierModel("OLMoE-1B-7B-0125", 7, 1.3, 49, 0.295, 0.136),
    EarlierModel("gpt-oss-20b", 21, 3.6, 1465, 0.381, 0.454),
    EarlierModel("Qwen3-30B-A3B", 30.5, 3.3, 110, 0.355, 0.451),
    EarlierModel("Mixtral-8x7B-v0.1", 47, 12.9, 4635, 0.502, 0.374),
    EarlierModel(
        "Qwen3-Next-80B-A3B", 80, 3, 504, 0.575, 0.351, ("Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next-80B-A3B-Thinking")
    ),
    EarlierModel("GLM-4.5-Air", 106, 12, 459, 0.633, 0.457),
    EarlierModel("gpt-oss-120b", 117, 5.1, 1695, 0.331, 0.500),
    EarlierModel("Qwen3-0.6B", 0.6, 0.6, 9212, 0.327, 0.665),
    EarlierModel("Qwen3-1.7B", 1.7, 1.7, 16563, 0.303, 0.784),
    EarlierModel("Qwen3-4B", 4, 4, 1042, 0.348, 0.688),
    EarlierModel("Qwen3-8B", 8, 8, 777, 0.323, 0.708),
    EarlierModel("Qwen3-14B", 14, 14, 985, 0.314, 0.790),
)
"""The pipeline before this one: reading `legacy`, 16 sequences x 2,048 tokens of FineWeb-Edu; `pairs` are
feature-sequence pairs, one feature counted up to once a sequence, not hits. The dense Qwen3's parameters are their names'."""


def earlier(model_id: str) -> EarlierModel | None:
    """The earlier pipeline's row of the model with this id: one of its names behind the last slash, letters of any case."""
    name = model_id.rpartition("/")[2].lower()
    return next((row for row in EARLIER if name in [known.lower() for known in (row.model, *row.also)]), None)
