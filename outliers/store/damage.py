"""What differs from what was written, and the checks of a capture's small files: sums of experts, counts of what was freed."""

from __future__ import annotations

import zipfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from outliers.files.sealed import check_folder
from outliers.store.journal import Journal
from outliers.study.expert_shapes import SUMS

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
"""What zarr raises for bytes that it can't decode."""


class Damage(BaseModel):
    """One difference from what was written. `layer` is the model's; checksums are CRC-32 in hex, only of chunks."""

    model_config = ConfigDict(frozen=True)

    file: str
    """Below the capture's folder."""
    problem: str
    sequence: int | None = None
    layer: int | None = None
    site: str | None = None
    journaled: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}, "
        place = "" if self.site is None else f" (sequence {self.sequence}, {where}{self.site})"
        return f"{self.file} {self.problem}{place}"


def check_sums(folder: Path) -> list[Damage]:
    """The sums of experts: each array of a file has a checksum there."""
    damage = []
    for path in sorted((folder / SUMS).glob("*.npz")):
        try:
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
            problem = None if wrong is None else f"has another checksum of {wrong} than was written"
        except (*UNREADABLE, EOFError, zipfile.BadZipFile) as error:
            problem = f"can't be read ({error})"
        if problem:
            damage.append(Damage(file=str(path.relative_to(folder)), problem=problem))
    return damage


def check_counts(folder: Path, journal: Journal) -> list[Damage]:
    """The summaries of sequences that were counted and freed."""
    states = [line.state for line in journal.counted.values() if line.state is not None]
    return [
        Damage(file=state, problem="is not what was counted") for state in states if not check_folder(folder / state)
    ]
