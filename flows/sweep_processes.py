"""The studies of `outliers sweep` as processes: `outliers study --spec FILE --json`, each in a session of its own.

Each has three files in the sweep's folder: NAME.spec.json, NAME.json (its answer), NAME.log.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from outliers.errors import JobFailed
from outliers.files.atomic import write_atomic
from outliers.publish.outcome import Outcome
from outliers.study.prepare import prepare
from outliers.sweep.outcome import Ended, end_of, end_without
from outliers.sweep.sweep import SweepStudy
from outliers.workspace import open_workspace

log = logging.getLogger(__name__)

_PROCESS = """
import os, signal, sys, threading
# a SIGTERM, from the sweep or because the sweep is gone, acts as Ctrl-C does, which takes the job along
signal.signal(signal.SIGTERM, signal.default_int_handler)
def watch():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
from flows.cli.command import main
sys.exit(main(sys.argv[1:]))
"""
"""The program of a child. Its standard input ends when the sweep does, however that ends. The kernel's signal at a parent's
death does not serve: it comes once for each thread of the parent, and the second one breaks off what the first began."""


class Processes:
    """Starts each study as a process, `outliers study`.

    Args:
        folder: for the files of the children; no other run uses it
        api_url: of the Prefect server that all children use, or each would start one of its own
    """

    def __init__(self, folder: Path, api_url: str) -> None:
        self._folder, self._api_url = folder, api_url
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, study: SweepStudy) -> ProcessChild:
        spec = self._folder / f"{study.name}.spec.json"
        write_atomic(spec, study.spec.model_dump_json(indent=1).encode())
        return ProcessChild(study, spec, self._environment())

    def _environment(self) -> dict[str, str]:
        # these variables describe the sweep's own run, not a study's
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
        return kept | {"PREFECT_API_URL": self._api_url}


class ProcessChild:
    """`outliers study --spec FILE --json` in a session of its own; ends with the sweep, however that ends."""

    def __init__(self, study: SweepStudy, spec: Path, environment: dict[str, str]) -> None:
        self._study, self._began = study, time.monotonic()
        self._log = spec.with_name(f"{study.name}.log")
        self._answer = spec.with_name(f"{study.name}.json")
        with self._log.open("wb") as said, self._answer.open("wb") as out:
            self.process = subprocess.Popen(
                # -P: a folder called `flows` where the person stands is not ours
                [sys.executable, "-P", "-c", _PROCESS, "study", "--spec", str(spec), "--json"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=said,
                start_new_session=True,
            )

    def poll(self) -> Ended | None:
        code = self.process.poll()
        if code is None:
            return None
        seconds = time.monotonic() - self._began
        if code == 0:
            try:
                outcome = self._outcome()
            except JobFailed as error:
                return self._ended("failed", str(error), seconds)
            wrong = _other_study(self._study, outcome)
            if wrong:
                return self._ended("failed", wrong, seconds)
            return end_of(self._study, outcome, str(self._log), seconds)
        return self._ended("cancelled" if code == 130 else "failed", _last_words(self._log, code), seconds)

    def cancel(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def join(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _ended(self, state: Literal["failed", "cancelled"], reason: str, seconds: float) -> Ended:
        return end_without(self._study, state, reason, str(self._log), seconds)

    def _outcome(self) -> Outcome:
        try:
            content = json.loads(self._answer.read_text("utf-8"))
            content.pop("capture_bytes", None)
            return Outcome.model_validate(content)
        except (OSError, ValueError, AttributeError) as error:
            raise JobFailed(f"what its process answered can't be read ({self._answer}): {error}") from error


def _other_study(study: SweepStudy, outcome: Outcome) -> str:
    """What is wrong where a process answers with another study than it was started for; empty where nothing is."""
    try:
        expected = prepare(study.spec, open_workspace(study.spec.compute.workspace)).study_id
    except Exception as error:  # noqa: BLE001 - a study that is done: nothing here may make it fail
        # for instance, the hub does not answer now
        log.warning("%s: its answer can't be compared with what was asked: %s", study.name, error)
        return ""
    if outcome.study_id == expected:
        return ""
    moved = "; its branch on the hub may have moved meanwhile: the same sweep again settles it" * study.from_hub
    return f"its process answered with the study {outcome.study_id}, and {expected} was asked{moved}"


def _last_words(log: Path, code: int) -> str:
    """Why a process ended: the command's last message (`refused: ...`, `failed: ...`), else its last line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    said = [number for number, line in enumerate(lines) if line.startswith(("refused: ", "failed: "))]
    text = " ".join(lines[said[-1] :]) if said else (lines[-1] if lines else "it said nothing")
    text = text.removeprefix("failed: ")
    return f"ended by signal {-code}: {text}" if code < 0 else text
