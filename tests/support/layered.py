"""Captures of a tiny model by layers beside whole ones: what is compared is every file."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from outliers.capture.extract import extract
from outliers.workspace import open_workspace
from tests.support.captured import prepared
from tests.support.synthetic import Silent

CAPTURE = {"sites": ("attn_in", "mlp_in", "resid"), "batch_sequences": 2, "perplexity": True}
ASIDE = ("lock", "extractions.jsonl")


def texts(folder):
    """A folder of documents of different lengths, for padded batches."""
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text("The quick brown fox - jumps.\n"[: 5 + 3 * number])
    return folder


def study_of(workspace, folder, text, schedule, packing="joined", no_keep_weights=False, **capture):
    """Five sequences in batches of two: the last one is smaller."""
    return prepared(
        workspace,
        folder,
        text,
        sequences=5,
        capture=CAPTURE | capture,
        corpus={"packing": packing},
        compute={"schedule": schedule, "no_keep_weights": no_keep_weights},
    )


def files_of(workspace, study):
    """Every file of a capture by name, but for the lock, the record of its runs, and notes of when sums were written.

    The lines of the journal are sorted: sequences of a batch are journaled as the writers finish them.
    """
    root = workspace.capture(study.capture_id)
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    aside = {*ASIDE, *(name for name in found if re.fullmatch(r"experts/\d+-\d+\.json", name))}
    found["journal.jsonl"] = b"".join(sorted(found["journal.jsonl"].splitlines(keepends=True)))
    return {name: content for name, content in found.items() if name not in aside}


def captured(root, folder, text, schedule, packing="joined", **capture):
    """The files of a whole capture in a workspace of its own, and its id."""
    workspace = open_workspace(root)
    study = study_of(workspace, folder, text, schedule, packing, **capture)
    result = extract(study, workspace, Silent())
    assert result["sequences"] == 5
    return files_of(workspace, study), study.capture_id


class Stopped(Exception):
    """Ends a capture at a step."""


def stop_at(name, times=1):
    """A Step that raises at the `times`-th step whose name begins so."""
    left = [times]

    def step(done):
        if done.startswith(name):
            left[0] -= 1
            if left[0] == 0:
                raise Stopped(done)

    return step


def kill_at(name, times):
    """The same, by SIGKILL."""

    def step(done):
        try:
            inner(done)
        except Stopped:
            os.kill(os.getpid(), signal.SIGKILL)

    inner = stop_at(name, times)
    return step


if __name__ == "__main__":
    root, folder, text, name, times = sys.argv[1:]
    own = open_workspace(Path(root))
    extract(study_of(own, folder, text, "layers"), own, Silent(), on_step=kill_at(name, int(times)))
