"""Lists, finds and removes the captures of a workspace, which nothing else removes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from outliers.errors import BadInput, CaptureError, CorruptCapture
from outliers.files.atomic import held_bytes
from outliers.files.sealed import read_sealed
from outliers.names import nearest
from outliers.store.chunks import ARRAYS, Journal, hold
from outliers.store.fingerprint import layout_from, read_fingerprint
from outliers.workspace import Workspace

LAYERS, LAYER_PLAN, LAYER_LINES = "layers", "plan.json", "layers.jsonl"
"""Folder and files of a capture by layers (outliers/capture/by_layers/record.py)."""
LAYER_VERSION = 1
"""Version of its plan."""


class Held(BaseModel):
    """One capture on disk; a damaged one has `of_sequences` 0."""

    model_config = ConfigDict(frozen=True)

    capture_id: str
    model: str
    done: int
    counted: int = 0
    """Sequences that were counted and freed (--store rolling)."""
    of_sequences: int
    layer_batches: int = 0
    """Pairs of a layer and a batch that are done, while a model is read a layer at a time (--schedule layers)."""
    of_layer_batches: int = 0
    """Of how many; 0 where no such capture was begun, and once its sequences are journaled."""
    bytes: int


def list_captures(workspace: Workspace) -> tuple[Held, ...]:
    """Every capture of a workspace, finished or not, by id."""
    found = []
    for name in _ids(workspace):
        folder = workspace.capture(name)
        model, done, counted, total = "damaged", 0, 0, 0
        layers: dict[str, int] = {}
        try:
            fingerprint = read_fingerprint(folder)
            if fingerprint is None and (folder / "summaries").is_dir() and not (folder / ARRAYS).exists():
                model = "(summaries alone)"
            if fingerprint is not None:
                # before the journal: a capture that is finished meanwhile is then seen as finished
                layers = _of_layers(folder / LAYERS)
                journal = Journal.open(folder / "journal.jsonl", keep=lambda line: {})
                done, counted = len(journal.done), len(journal.freed)
                model, total = str(fingerprint["fixed"].get("model", "?")), layout_from(fingerprint).num_sequences
        except CaptureError:
            pass  # listed as damaged, so that a person can examine or remove it
        facts = {"done": done, "counted": counted, "of_sequences": total, "bytes": held_bytes(folder)} | layers
        found.append(Held.model_validate({"capture_id": name, "model": model, **facts}))
    return tuple(found)


def _of_layers(folder: Path) -> dict[str, int]:
    """How far a capture by layers is; empty where none was begun. Raises CorruptCapture for a damaged line, or another plan."""
    plan = read_sealed(folder / LAYER_PLAN)
    if plan is None or plan.get("version") != LAYER_VERSION:
        return {}
    try:
        done = Journal.open(folder / LAYER_LINES, keep=lambda line: {}).done
    except FileNotFoundError:
        return {}  # the capture was journaled meanwhile, and its folder went
    try:
        units = int(plan["layers"]) * len(plan["batches"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCapture(f"{folder / LAYER_PLAN} is not the plan of a capture by layers") from error
    return {"layer_batches": len(done), "of_layer_batches": units}


def find_capture(workspace: Workspace, name: str) -> Path:
    """The folder of a capture, given by id or path; only reads the workspace. Raises BadInput if it is unknown."""
    folder = Path(name).expanduser().absolute() if os.sep in name else workspace.capture(name)
    if os.sep in name and (folder / "capture.json").exists():
        return folder
    if folder.parent != workspace.captures or not folder.is_dir() or name in (os.curdir, os.pardir):
        known = _ids(workspace)
        raise BadInput(
            f"there is no capture {name} in {workspace.root}{nearest(name, known)}; there is: {', '.join(known) or 'none'}"
        )
    return folder


def remove_capture(workspace: Workspace, capture_id: str) -> int:
    """Remove one capture; returns the bytes that this frees. Raises BadInput if it is unknown, Busy if it is in use."""
    folder = find_capture(workspace, capture_id)
    if folder.parent != workspace.captures:
        raise BadInput(f"{folder} is not in {workspace.root}: give its workspace with --workspace, and its id")
    held = held_bytes(folder)
    with hold(folder):
        # the journal first: an interrupted removal then leaves no sequence that counts as done
        (folder / "journal.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder)
    return held


def _ids(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in workspace.captures.glob("*") if path.is_dir())
