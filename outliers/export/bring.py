"""Brings the private summary of a study home from the machine that made it: `outliers export --full`.

It is a few megabytes for each site, some hundred more with experts, and is checked like a shard's. The machine must still be
held: nothing is rented for it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from outliers.counting.summary_files import TOTALS, has_summary
from outliers.errors import BadInput, CorruptCapture
from outliers.export.source import described
from outliers.files.atomic import temporary_for
from outliers.machines.base import Machine, Rental
from outliers.machines.providers import provider
from outliers.machines.rentals import Rentals
from outliers.study.demand import demand_of
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace


def bring_summary(workspace: Workspace, study_id: str, capture_id: str) -> str | None:
    """Put the private summary of a study where `workspace.summary` says; the machine it came from, None if it was here.

    Raises BadInput where no machine of this study is held or it has no such summary, CorruptCapture where what came is
    damaged, and what machines raise.
    """
    place = workspace.summary(capture_id, study_id)
    if (place / TOTALS).exists():
        return None
    machine = find_machine(workspace, study_id, capture_id)
    prepared = described(workspace, study_id, capture_id)
    fetch_summary(machine, place, prepared)
    return machine.name


def find_machine(workspace: Workspace, study_id: str, capture_id: str) -> Machine:
    """The machine of a study that is held now. Raises BadInput."""
    held = [rental for rental in Rentals(workspace.root).all() if _is_of(rental, study_id, capture_id)]
    for rental in held:
        machine = provider(rental.provider, workspace.root).find(rental.name)
        if machine is not None:
            return machine
    raise BadInput(
        f"no machine of the study {study_id} is held, so its statistics can't be brought home. A host of provider ssh has them "
        f"still, unless --remove-files was given: copy the folder captures/{capture_id}/summaries/{study_id} below "
        f"~/.outliers/machines/ there to the same place in {workspace.root}. A rented machine that has ended took them along: "
        "run the study again with --keep-running"
    )


def _is_of(rental: Rental, study_id: str, capture_id: str) -> bool:
    """Whether a machine was held for a study: by the name that is made of its capture, or by a run of it (STUDY.RUN)."""
    named = rental.name == f"outliers-{capture_id}" or any(
        holder.partition(".")[0] == study_id for holder in rental.holders
    )
    return named and rental.state == "up"


def fetch_summary(machine: Machine, place: Path, prepared: Prepared) -> None:
    """Bring a summary from a machine to `place`, whole or not at all. Raises BadInput where it has none; CorruptCapture."""
    study_id, most = prepared.study_id, demand_of(prepared.spec, prepared.model).summary_bytes
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_for(place)
    try:
        machine.download(f"captures/{prepared.capture_id}/summaries/{study_id}", draft, max_bytes=most)
        if not has_summary(draft):
            raise CorruptCapture(f"the summary of {study_id} that came from {machine.name} is not whole: try again")
        try:
            draft.rename(place)
        except OSError:
            if not has_summary(place):  # another process may have brought it meanwhile
                raise
    except BadInput as error:
        raise BadInput(f"{machine.name} has no summary of the study {study_id}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
