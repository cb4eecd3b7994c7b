"""What killed processes leave in the folders of jobs: room that was kept for last words, half-written files, drafts.

A supervisor that is killed removes nothing, and its job may never be started again under that name. So whoever finds a job
dead tidies its folder, and whoever starts one tidies them all. Before it: `jobs`, which says what is in such a folder.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from outliers.files.atomic import unfinished_name
from outliers.locks import held_if_free, is_locked

RESERVE = "reserve"
"""Room on the disk that a job's supervisor keeps for how the job ended."""
DRAFT = ".new"
"""The folder of an attempt that is being made."""
PART_SECONDS = 60.0
"""A half-written file is left alone for so long."""


def tidy(folder: Path) -> None:
    """Remove what a killed supervisor has left of one attempt: its reserve, and files it was about to write.

    An attempt that runs is left alone. Raises nothing: what can't be removed stays.
    """
    with contextlib.suppress(OSError):
        if is_locked(folder / "lock"):
            return
        for path in folder.iterdir():
            # one that is young may be somebody's who writes how a dead job ended
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
