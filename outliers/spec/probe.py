"""ProbeSpec: what a probe changes in a model, and on how much of the corpus.

A probe reads a study's corpus again with a change at a site, and measures against the untouched pass. Part of a StudySpec,
never of a study's id: a probe has an id of its own.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from pydantic import ConfigDict, Field, field_validator

from outliers.spec.formats import expand, parse_format
from outliers.spec.part import Part

WORDS: Final = ("systematic", "matched", "random")
"""Sets of features that a study names: those that it found; those of the same magnitude that are not systematic; random ones."""
_FEATURES = re.compile(r"systematic|matched|random(=[1-9][0-9]{0,2})?|[0-9]{1,7}")
_WEIGHT = re.compile(r"auto|[0-9]{1,4}\.[A-Za-z_][A-Za-z0-9_.]*\[[0-9]{1,7},[0-9]{1,7}\]")
_EXPERT = re.compile(r"super|[0-9]{1,4}\.[0-9]{1,5}")
_MAPPED = re.compile(r"all|[0-9]{1,4}(\.[0-9]{1,5})?")
FEATURES_HELP = "systematic (those of the study), matched (as large, and not systematic), random=5, or numbers"


SUPER: Final = "super"
"""The experts that a study found to be super experts."""
ALL: Final = "all"
"""All experts of all layers of a study."""


def _plain(name: str) -> str:
    """`01.068` as `1.68`: one expert has one name."""
    return ".".join(str(int(part)) for part in name.split("."))


class ProbeSpec(Part):
    """What is changed in the model to see what that does to it (docs/probes.md)."""

    model_config = ConfigDict(title="with options")

    probe: Literal["none", "check"] = Field(
        "none",
        description="check: read the corpus again without the outlier features (and without as many others, as a control), "
        "and with the formats of --formats, before the machine is given back",
    )
    zero: tuple[str, ...] = Field((), max_length=256, description=f"features to set to zero: {FEATURES_HELP}")
    mean: tuple[str, ...] = Field(
        (), max_length=256, description=f"features to replace by their mean over the corpus: {FEATURES_HELP}"
    )
    quantize: tuple[str, ...] = Field(
        (),
        max_length=32,
        description="formats to quantize the inputs of all captured sites to, such as int8_token,nvfp4",
    )
    hold: tuple[str, ...] = Field(
        (),
        max_length=256,
        description="features that stay unquantized, in a second try of each format: systematic, or numbers",
    )
    weights: str | None = Field(None, description="format to quantize the weights behind those sites to, as well")
    smooth: tuple[float, ...] = Field(
        (), max_length=8, description="SmoothQuant strengths to try each format with, such as 0.25,0.5,0.75"
    )
    prefix: str | None = Field(
        None,
        max_length=256,
        description="a text, or ids such as 0,5, that comes before each sequence and stays unquantized; auto: the token of "
        "the largest massive activation",
    )
    weight: tuple[str, ...] = Field(
        (),
        max_length=64,
        description="single weights to set to zero: LAYER.MODULE[ROW,COLUMN] such as 11.mlp.down_proj[507,1229], or auto for the "
        "largest candidates of the pass",
    )
    experts: tuple[str, ...] = Field(
        (),
        max_length=256,
        description="experts of a mixture to silence: LAYER.EXPERT such as 1.68, or super for those that the study found; each "
        "and, to compare, a random one and one of equal load in its layer",
    )
    map: str | None = Field(
        None,
        description="format of a sensitivity map: each site of each layer alone is quantized to it (int8_token is usual)",
    )
    map_experts: tuple[str, ...] = Field(
        (),
        max_length=256,
        description="experts of a mixture whose input alone is quantized to the map's format, one at a time: LAYER.EXPERT "
        "such as 1.68, LAYER for all of a layer, or all",
    )
    probe_sequences: int = Field(
        16,
        ge=2,
        le=1_000_000,
        description="sequences of the corpus that a probe reads, the first ones; 16 or more give intervals",
    )
    probe_dtype: Literal["study", "float32"] = Field(
        "study", description="what the probed model computes in; float32 also sees what bfloat16 rounds away"
    )

    @field_validator("zero", "mean", "hold")
    @classmethod
    def _features(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _FEATURES.fullmatch(name):
                raise ValueError(f"'{name}' is not a set of features: give {FEATURES_HELP}")
        return tuple(dict.fromkeys(names))

    @field_validator("quantize")
    @classmethod
    def _formats(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return expand(names)

    @field_validator("map", "weights")
    @classmethod
    def _format(cls, name: str | None) -> str | None:
        return None if name is None else parse_format(name).name

    @field_validator("weight")
    @classmethod
    def _weight(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _WEIGHT.fullmatch(name):
                raise ValueError(f"'{name}' is not LAYER.MODULE[ROW,COLUMN] or auto")
        return tuple(dict.fromkeys(names))

    @field_validator("experts")
    @classmethod
    def _experts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _EXPERT.fullmatch(name):
                raise ValueError(f"'{name}' is not LAYER.EXPERT such as 1.68, or super")
        return tuple(dict.fromkeys(name if name == SUPER else _plain(name) for name in names))

    @field_validator("map_experts")
    @classmethod
    def _mapped(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _MAPPED.fullmatch(name):
                raise ValueError(f"'{name}' is not LAYER.EXPERT such as 1.68, LAYER such as 1, or all")
        return tuple(dict.fromkeys(name if name == ALL else _plain(name) for name in names))

    @field_validator("smooth")
    @classmethod
    def _strengths(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < strength < 1 for strength in strengths):
            raise ValueError(f"a strength is between 0 and 1; got {', '.join(f'{s:g}' for s in strengths)}")
        return strengths

    @property
    def asked(self) -> bool:
        """Whether there is anything to do."""
        changes = (self.zero, self.mean, self.quantize, self.weights, self.weight, self.map, self.prefix, self.experts)
        return self.probe != "none" or any(changes) or bool(self.map_experts)
