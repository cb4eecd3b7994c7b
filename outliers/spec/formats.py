"""Number formats that quantization uses: their names, each of which carries its rule, and the section of a spec that asks.

It knows names and shapes of groups, and computes nothing: `outliers.quantization` does. Rules, with their sources, are in
docs/quantization.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pydantic import ConfigDict, Field, field_validator

from outliers.spec.part import Part

BASES: Final = (
    "int8_token",
    "int8_tensor",
    "int8_channel",
    "int4_token",
    "fp8_token",
    "fp8_tensor",
    "mxfp8_floor",
    "mxfp8_rceil",
    "mxfp4_floor",
    "mxfp4_even",
    "nvfp4",
)
"""Every format without rotation."""
STATIC: Final = ("int8_tensor", "int8_channel", "fp8_tensor", "nvfp4")
"""Formats with a scale that is fixed before a token comes: it is made of the corpus' own range. nvfp4's is its global scale."""
PRESETS: Final[dict[str, tuple[str, ...]]] = {
    "int8": ("int8_token", "int8_tensor", "int8_channel"),
    "fp4": ("mxfp4_even", "nvfp4"),
    "all": BASES,
}
"""One word for several formats."""
ROTATIONS: Final = (16, 32, 64, 128)
"""Widths of the blocks of a rotation."""
_ROTATED = re.compile(r"had(16|32|64|128)\+(.+)")


@dataclass(frozen=True)
class Format:
    """One number format. `rotation`: width of the blocks of the Hadamard rotation before it, 0 for none."""

    base: str
    rotation: int = 0

    @property
    def name(self) -> str:
        """`nvfp4`, or `had64+nvfp4`."""
        return f"had{self.rotation}+{self.base}" if self.rotation else self.base

    @property
    def group(self) -> int:
        """Neighbouring features that share a scale; 0 where a whole token, column or tensor does."""
        return 16 if self.base == "nvfp4" else 32 if self.base.startswith("mx") else 0

    @property
    def is_static(self) -> bool:
        """Whether a scale of it is made of the corpus' own range."""
        return self.base in STATIC


def parse_format(name: str) -> Format:
    """`nvfp4` or `had64+nvfp4` as a Format. Raises ValueError with what is allowed."""
    rotated = _ROTATED.fullmatch(name)
    found = Format(rotated[2], int(rotated[1])) if rotated else Format(name)
    if found.base not in BASES:
        raise ValueError(
            f"'{name}' is not a format: give {', '.join(BASES)}, one of them behind had16+, had32+, had64+ or had128+ (rotated), "
            f"or {', '.join(PRESETS)} for several"
        )
    return found


def is_format(name: str) -> bool:
    """Whether a name is that of a format."""
    try:
        parse_format(name)
    except ValueError:
        return False
    return True


def bits_of(name: str) -> float:
    """Bits a value of a format, its groups' scales included; scales of a token, column or tensor are not counted."""
    base = parse_format(name).base
    bits = 4.0 if "4" in base.partition("_")[0].removeprefix("mx") else 8.0
    if base == "nvfp4":
        return bits + 8 / 16  # an e4m3 scale for each 16 values
    return bits + 8 / 32 if base.startswith("mx") else bits  # an e8m0 scale for each 32


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """Formats with each preset in the place of its word, each once, in the order given. Raises ValueError."""
    found = [own for name in names for own in PRESETS.get(name, (name,))]
    return tuple(dict.fromkeys(parse_format(name).name for name in found))


class FormatsSpec(Part):
    """Which number formats are tried on the captured activations."""

    model_config = ConfigDict(title="with options")

    formats: tuple[str, ...] = Field(
        (),
        max_length=32,
        description="measure the error of these number formats at every site: int8_token, int8_tensor, int8_channel, "
        "int4_token, fp8_token, fp8_tensor, mxfp8_floor, mxfp8_rceil, mxfp4_floor, mxfp4_even, nvfp4; int8, fp4 and all stand "
        "for several; had64+nvfp4 rotates before",
    )
    format_tokens: int = Field(
        32_768,
        ge=1,
        le=1_000_000_000,
        description="tokens the error of formats is measured on: whole sequences, spread evenly over the corpus; all of them "
        "where it has no more",
    )

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        return expand(formats)
