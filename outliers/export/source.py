"""A study as exports read it: its description, the modules that read its sites, and the statistics of each column.

Statistics come from the private summary, which is next to the capture and is never published. What a format needs and the
study lacks is refused here, with the option that captures it. It knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from outliers.counting.summary import Summary
from outliers.counting.summary_files import STUDY, TOTALS, read_summary
from outliers.errors import BadInput, CaptureError, CorruptCapture
from outliers.experts.totals import ExpertTotals
from outliers.experts.totals_files import has_totals, read_totals
from outliers.files.sealed import read_sealed
from outliers.model.readers import Reader, find_readers
from outliers.study.prepare import Prepared
from outliers.units import format_ranges
from outliers.workspace import Workspace

SITES = ("attn_in", "mlp_in", "o_in", "down_in")
"""What projections read, in the order of a layer."""
ALL_SITES = f"--sites {','.join(SITES)}"
MOE_SITES = f"--sites {','.join(SITES[:3])}"
"""Of a model with experts: a study has down_in in every layer or in none, and a layer of experts has no dense MLP."""
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Columns:
    """Statistics of one input, a value for each of its columns, over all tokens of the corpus.

    count: how many tokens. total, squares: (W,) float64, sums of x and of x^2. least, largest: (W,) float32.
    """

    count: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    least: NDArray[np.float32]
    largest: NDArray[np.float32]

    @property
    def magnitude(self) -> NDArray[np.float32]:
        """(W,) float32, the largest abs(x) of each column."""
        return np.maximum(np.abs(self.least), np.abs(self.largest))

    @property
    def peak(self) -> float:
        """The largest abs(x) of all columns."""
        return float(self.magnitude.max())


@dataclass(frozen=True)
class Study:
    """A finished study. `summary` is None where its private summary is not on this computer; `experts` is None there, too, and
    where the study keeps no sums of experts."""

    prepared: Prepared
    readers: tuple[Reader, ...]
    summary: Summary | None
    experts: ExpertTotals | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.prepared.model.source.name

    def columns(self, site: str, layer: int) -> Columns:
        """The statistics of a site in a layer. The caller has called `check_sites`."""
        totals, index = self._summary().sites[site], self.prepared.layers.index(layer)
        return Columns(
            count=int(totals.finite[index].max()),
            total=totals.moments[0, index],
            squares=totals.moments[1, index],
            least=totals.min[index],
            largest=totals.max[index],
        )

    def has(self, site: str, layer: int) -> bool:
        """Whether the statistics of a site in a layer are known."""
        return self.summary is not None and site in self.summary.sites and layer in self.prepared.layers

    def reads(self, site: str, layer: int) -> tuple[Reader, ...]:
        """The modules that read a site in a layer."""
        return tuple(reader for reader in self.readers if reader.site == site and reader.layer == layer)

    def check_sites(self, sites: tuple[str, ...], why: str) -> None:
        """Refuse what lacks the statistics of a site in every layer that has it. `why`: who needs them, for the message.

        Raises BadInput with the option that captures what is missing.
        """
        summary, capture = self._summary(), self.prepared.spec.capture
        there = [site for site in sites if any(reader.site == site for reader in self.readers)]
        missing = [site for site in there if site not in summary.sites]
        if missing:
            raise BadInput(
                f"{why} needs {_and(_inputs(site, self.readers) for site in missing)}, and this study did not capture the site "
                f"{_and(missing)}: run it again with {sites_for(self.prepared)}"
            )
        renamed = [item for item in capture.site_modules if item.partition("=")[0] in there]
        if renamed:
            raise BadInput(
                f"{why} needs the inputs of projections, and this study read another module in their place "
                f"(--site-module {renamed[0]}): run it again without that option"
            )
        wanted = sorted({reader.layer for reader in self.readers if reader.site in there})
        absent = [layer for layer in wanted if layer not in self.prepared.layers]
        if absent:
            raise BadInput(
                f"{why} needs every layer, and this study captured {len(self.prepared.layers)} of "
                f"{self.prepared.model.num_layers}; missing are {format_ranges(absent)}: run it again with --layers all"
            )
        self._check_values(there, why)

    def _check_values(self, sites: list[str], why: str) -> None:
        """Refuse values that are not finite: sums leave them out, and the program that reads the file would not know."""
        summary = self._summary()
        for site in sites:
            for index, found in enumerate(summary.sites[site].nonfinite.tolist()):
                if found:
                    raise BadInput(
                        f"{why} needs finite values, and {found:,} values at {site} of layer {self.prepared.layers[index]} are "
                        f"not: {self.prepared.model.dtype} can't hold them; run the study again with --dtype float32"
                    )

    def _summary(self) -> Summary:
        if self.summary is None:
            place = f"captures/{self.prepared.capture_id}/summaries/{self.prepared.study_id}"
            raise BadInput(
                "the statistics of each column of this study are not on this computer, where only its results are: --full brings "
                "them home from the machine that made them, as long as it is held; or copy the folder "
                f"{place} from that machine's workspace to this one's"
            )
        return self.summary


def open_study(workspace: Workspace, study_id: str, capture_id: str) -> Study:
    """A study by its ids, with its private summary where that is here.

    Raises BadInput where nothing here describes it, or where its modules have no known names; CorruptCapture.
    """
    private = workspace.summary(capture_id, study_id)
    summary = read_summary(private) if (private / TOTALS).exists() else None
    prepared = described(workspace, study_id, capture_id, private if summary else None)
    if summary is not None:
        _check_summary(summary, prepared, private)
    readers = find_readers(prepared.model, workspace)
    # the description may come from another machine, and these names go into files that other programs run
    strange = next((reader.name for reader in readers if not _MODULE.fullmatch(reader.name)), None)
    if strange is not None:
        raise CorruptCapture(f"{strange!r} in the description of {study_id} is not the name of a module")
    return Study(prepared, readers, summary, _experts(private, prepared) if summary is not None else None)


def _experts(private: Path, prepared: Prepared) -> ExpertTotals | None:
    """The totals of experts next to a summary; None where the study keeps none. Raises CorruptCapture."""
    if not has_totals(private):
        return None
    totals = read_totals(private)
    if totals.study_id != prepared.study_id:
        raise CorruptCapture(f"the experts in {private} are of the study {totals.study_id}: analyze again")
    return totals


def described(workspace: Workspace, study_id: str, capture_id: str, private: Path | None = None) -> Prepared:
    """The description of a study: next to its summary in `private`, or as it was sent to the machine that ran it.

    Raises BadInput where there is none, CorruptCapture.
    """
    found: Prepared | None = None
    try:
        if private is not None:
            found = Prepared.model_validate_json((private / STUDY).read_bytes())
        for folder in ("studies", "sent"):
            content = None if found else read_sealed(workspace.root / folder / f"{study_id}.json")
            found = found or (Prepared.model_validate(content) if content else None)
    except (OSError, ValidationError) as error:
        raise CorruptCapture(
            f"the description of the study {study_id} can't be read: {error}; analyze again"
        ) from error
    if found is None:
        raise BadInput(
            f"{workspace.root} holds nothing but the results of {study_id}, if those: run `outliers export {study_id}` on the "
            "computer that started the study, with its workspace"
        )
    if (found.study_id, found.capture_id) != (study_id, capture_id):
        raise CorruptCapture(f"the description next to {study_id} is of the study {found.study_id}: analyze again")
    return found


def _check_summary(summary: Summary, prepared: Prepared, private: Path) -> None:
    """Raise where a summary is not of this study's whole corpus, or of other shapes than its description says."""
    frame = summary.frame
    if frame.study_id != prepared.study_id or frame.num_layers != len(prepared.layers):
        raise CorruptCapture(f"the summary in {private} is not of the study that is described there: analyze again")
    wanted = prepared.corpus.num_sequences
    if summary.sequences.size != wanted:
        raise CaptureError(
            f"the summary in {private} is of {summary.sequences.size} of {wanted} sequences: `outliers merge` it with the others"
        )


def sites_for(prepared: Prepared) -> str:
    """The option that captures every site of a study's model."""
    return MOE_SITES if prepared.model.anatomy.moe_layers else ALL_SITES


def _inputs(site: str, readers: tuple[Reader, ...]) -> str:
    """Whose input a site is, for a person: `the input of o_proj`."""
    names = dict.fromkeys(reader.name.rpartition(".")[2] for reader in readers if reader.site == site)
    return f"the input of {_and(names)}"


def _and(names: Iterable[str]) -> str:
    """`a, b and c`."""
    words = list(names)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
