"""The workspace: one folder that holds everything large or resumable, on the machine that works.

    captures/<capture_id>/   activations, journal, private summaries (gigabytes)
    results/<study_id>/      what may be published (kilobytes)
    asked/<study_id>.json    each study as it was asked for
    own/<study_id>.json      what a study of one's own files is called here, and its text: never published
    jobs/<name>/<attempt>/   detached steps: events, exit
    models/<key>/            descriptions of a model; converted GGUF weights
    corpora/<key>/           token ids, made once

It only names places. `open_workspace` refuses a folder that can't be written or that a newer version of this program made,
and makes sure that no other user of the machine can read it (`private`).
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from outliers.errors import WorkspaceError
from outliers.files.atomic import write_atomic
from outliers.files.private import ensure_private

WORKSPACE_FORMAT = 1
PRIVATE = (
    "asked",
    "captures",
    "corpora",
    "jobs",
    "locks",
    "machines",
    "models",
    "own",
    "parts",
    "prefect",
    "results",
    "runs",
    "sent",
    "shards",
    "studies",
    "sweeps",
)
"""Folders of a workspace. Each is made private if the workspace's own folder is open to others."""
FILES = ("hosts.json", "instance", "lease.json", "lease.lock", "watchdog.lock")
"""Files of a workspace, besides its marker."""
HOST = ("deploy", "hub", "machines", "uploads")
"""Names in the folder that the workspaces of a host share."""
_MARK = "workspace.json"


@dataclass(frozen=True)
class Workspace:
    """Names of places below `root` (absolute); it creates nothing by itself."""

    root: Path

    @property
    def captures(self) -> Path:
        return self.root / "captures"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def corpora(self) -> Path:
        return self.root / "corpora"

    def capture(self, capture_id: str) -> Path:
        """The folder of one capture."""
        return self.captures / capture_id

    def study(self, study_id: str) -> Path:
        """The results folder of one study."""
        return self.results / study_id

    def asked(self, study_id: str) -> Path:
        """The study as it was asked for here, with its machine and target: `outliers probe` asks again."""
        return self.root / "asked" / f"{study_id}.json"

    def own(self, study_id: str) -> Path:
        """What a study is called on this machine alone; next to it the text of its page (`publish.own`)."""
        return self.root / "own" / f"{study_id}.json"

    def summary(self, capture_id: str, study_id: str) -> Path:
        """The private summary of one study, next to its capture; never published."""
        return self.capture(capture_id) / "summaries" / study_id


def default_root() -> Path:
    """$OUTLIERS_WORKSPACE, else ~/.outliers."""
    return Path(os.environ.get("OUTLIERS_WORKSPACE") or Path.home() / ".outliers")


def open_workspace(path: str | Path | None = None) -> Workspace:
    """The workspace at `path` (default: `default_root()`), made if absent.

    It is for this user alone (`private.ensure_private`). Raises WorkspaceError where the folder can't be made or written,
    belongs to another user, or is of a newer format.
    """
    root = Path(path).expanduser().absolute() if path else default_root().expanduser().absolute()
    remedy = "give another folder with --workspace"
    try:
        ensure_private(root, marks=(_MARK,), folders=PRIVATE, files=(*FILES, *HOST))
        with tempfile.NamedTemporaryFile(dir=root, prefix=".writable-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise WorkspaceError(f"the workspace {root} can't be written: {error.strerror or error}; {remedy}") from error
    mark = root / _MARK
    if not mark.exists():
        write_atomic(mark, json.dumps({"format": WORKSPACE_FORMAT}).encode())
    try:
        found = json.loads(mark.read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WorkspaceError(f"{mark} is not a workspace's mark; {remedy}, or remove that file") from error
    if not isinstance(found, int) or found > WORKSPACE_FORMAT:
        raise WorkspaceError(
            f"the workspace {root} has format {found}, this version reads up to {WORKSPACE_FORMAT}: "
            f"upgrade outlier-features, or {remedy}"
        )
    return Workspace(root)


def settle_host_folder(root: Path) -> None:
    """Make the folder of a host that its workspaces share private, as `open_workspace` does its own. Raises the same errors."""
    ensure_private(root, marks=("deploy", _MARK), folders=HOST, files=(*FILES, *PRIVATE))
