"""Folders that only one user of a machine, or one group, can read, from the moment they exist.

A umask of 022 makes everything readable by every user. So the folders made here have mode 0700, and one that an earlier version
left open is closed once. A folder that also holds other things (/tmp, a home, a project) is not changed; what is made in it is
private by itself. A group that works in one folder marks it by its mode: writable by the group and setgid, as by `mkdir -m
2770`; such a folder stays open to its group, and to no other user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from outliers.errors import WorkspaceError

MINE = 0o700
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_GROUP = stat.S_ISGID | stat.S_IWGRP

_PASSING = re.compile(r"\.(writable-|nfs|.+\.[0-9a-f]{16}\.part$)")
"""Names of temporary files."""

_log = logging.getLogger(__name__)


def make_private(folder: Path, names: Sequence[str] = ()) -> None:
    """Make a folder with mode 0700 if it is absent; folders above it as the umask says. Raises OSError.

    `names`: folders in it that are made so as well, in a folder that was there and is open to others.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=MINE)
    mode = folder.stat().st_mode
    if mode & _OTHERS and not is_for_a_group(mode):
        for name in names:
            with contextlib.suppress(FileExistsError):
                (folder / name).mkdir(mode=MINE)


def is_for_a_group(mode: int) -> bool:
    """Whether a folder's mode marks it for a group: setgid and writable by the group."""
    return mode & _GROUP == _GROUP


def file_mode(folder: Path) -> int:
    """The mode of a file with names or secrets that is made in `folder`: for its owner, or for its group."""
    return 0o660 if is_for_a_group(folder.stat().st_mode) else 0o600


def ensure_private(folder: Path, *, marks: Sequence[str], folders: Sequence[str], files: Sequence[str]) -> None:
    """Make `folder` private if it is not; one of an earlier version is closed once, with a line in the log.

    `marks`: files or folders of which one is in every folder that we made; `folders`, `files`: all other names that we make in
    it. Raises WorkspaceError if it belongs to another user, who could read and replace all that is in it; OSError.
    """
    make_private(folder)
    found = folder.stat()
    mode, me = stat.S_IMODE(found.st_mode), os.geteuid()
    shut = mode & ~(stat.S_IRWXO if is_for_a_group(mode) else _OTHERS)
    if mode == shut and found.st_uid == me:
        return
    if found.st_uid not in (me, 0) and me != 0 and not is_for_a_group(mode):
        raise WorkspaceError(
            f"{folder} belongs to another user (uid {found.st_uid}), who could read and replace all that is in it; give a folder "
            "of your own, or one of a group (mkdir -m 2770)"
        )
    if mode == shut:
        return
    if (
        found.st_uid == me
        and any((folder / mark).exists() for mark in marks)
        and _is_ours(folder, mode, (*marks, *folders, *files))
    ):
        folder.chmod(shut)
        _log.warning(
            "%s was open to other users of this machine (mode %o); it has mode %o now. docs/machines.md says how a group "
            "shares one",
            folder,
            mode,
            shut,
        )
        return
    make_private(folder, folders)
    opened = [name for name in folders if _is_open(folder / name)]
    if opened:
        _log.warning(
            "%s is open to other users of this machine, and so is %s in it. It holds other things too and is left as it is: "
            "give another folder, or chmod 700 these",
            folder,
            ", ".join(opened[:5]),
        )


def _is_ours(folder: Path, mode: int, names: Sequence[str]) -> bool:
    """Whether a folder holds only what this project makes: it is not a home, nor like /tmp, and has no other names in it."""
    if mode & stat.S_ISVTX or folder.resolve() in (Path.home().resolve(), Path("/")):
        return False
    ours = re.compile("|".join(map(re.escape, names)))
    with os.scandir(folder) as entries:
        return all(ours.fullmatch(entry.name) or _PASSING.match(entry.name) for entry in entries)


def _is_open(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and bool(found.st_mode & _OTHERS)
