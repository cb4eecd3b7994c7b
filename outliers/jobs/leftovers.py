"""Removes what killed processes leave in the folders of jobs: reserves, half-written files, drafts.

A killed supervisor removes nothing, and no other job may ever start under its name. So a job that is found dead is tidied,
and every start tidies all jobs of the workspace.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from outliers.files.atomic import unfinished_name
from outliers.locks import held_if_free, is_locked

RESERVE = "reserve"
"""File that keeps room on the disk for the record of how the job ended."""
DRAFT = ".new"
"""Folder of an attempt that is being created."""
PART_SECONDS = 60.0
"""A half-written file younger than this is not removed."""


def tidy(folder: Path) -> None:
    """Remove what a killed supervisor has left of one attempt: its reserve, and half-written files.

    An attempt that runs is not touched. Raises nothing: what can't be removed stays.
    """
    with contextlib.suppress(OSError):
        if is_locked(folder / "lock"):
            return
        for path in folder.iterdir():
            # A young one may belong to a process that is writing how the dead job ended.
            old = unfinished_name(path.name) and path.lstat().st_mtime < time.time() - PART_SECONDS
            if path.name == RESERVE or old:
                path.unlink(missing_ok=True)


def tidy_all(workspace: Path) -> None:
    """`tidy` of every attempt at every job of a workspace, and of drafts whose starters were killed. Raises nothing."""
    with contextlib.suppress(OSError):
        for home in (workspace / "jobs").iterdir():
            for path in home.glob(f"[0-9]*/{RESERVE}"):
                tidy(path.parent)
            for path in home.glob("[0-9]*/.*.part"):
                tidy(path.parent)
            if (home / DRAFT).is_dir():
                _remove_draft(home)


def _remove_draft(home: Path) -> None:
    with held_if_free(home / "lock") as free:
        if free:  # else its starter is at work
            shutil.rmtree(home / DRAFT, ignore_errors=True)
