"""Damage x file x outcome: each kind of file of a finished study's workspace, damaged in each way; the same study asked again.

    .venv/bin/python -m tests.support.damage_table > table.md       the table of docs/reliability.md

A file is damaged where it is read: those of the results while everything is there, those of the summary once the results
are gone, those of the capture once the summary is gone too, those of models and corpora once the capture is gone. What
the study answers is compared with what it answered undisturbed, byte for byte. After it: `test_damage_table`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.counting.summary_files import has_summary
from outliers.dispatch.transfer import send_study
from outliers.errors import OutliersError
from outliers.jobs import jobs
from outliers.machines.local import LocalMachine
from outliers.publish.allowlist import MANIFEST, NUMBERS, PICTURES
from outliers.publish.manifest import results_digest
from outliers.publish.outcome import find_finished, find_outcome, make_outcome
from outliers.publish.publish import model_slug, publish
from outliers.results.write import write_results
from outliers.spec import StudySpec
from outliers.steps import run_analyze, run_extract, run_report
from outliers.study.prepare import Prepared, prepare, read_prepared
from outliers.workspace import Workspace, open_workspace
from tests.support import tiny
from tests.support.runs import quiet_run
from tests.support.synthetic import Silent

STATES = ("all is there", "results gone", "results and summary gone", "capture gone")
"""What else is missing when a file is damaged."""

KINDS: tuple[tuple[str, str, str, int], ...] = (
    # row of the table, path below the workspace, below it what varies, state in which it is read
    ("results: manifest.json", r"results/[^/]+/manifest\.json", "json", 0),
    ("results: summary.json", r"results/[^/]+/summary\.json", "json", 0),
    ("results: tokens.json", r"results/[^/]+/tokens\.json", "json", 0),
    ("results: features.parquet", r"results/[^/]+/features\.parquet", "", 0),
    ("results: pictures.json", r"results/[^/]+/pictures\.json", "json", 0),
    ("results: report.html", r"results/[^/]+/report\.html", "", 0),
    ("results: plots", r"results/[^/]+/plots/.*\.png", "", 0),
    ("results: run.log", r"results/[^/]+/run\.log", "", 0),
    ("summary: totals.npz", r"captures/[^/]+/summaries/[^/]+/totals\.npz", "", 1),
    ("summary: sequences/*.npz", r"captures/[^/]+/summaries/[^/]+/sequences/.*\.npz", "", 1),
    ("summary: study.json", r"captures/[^/]+/summaries/[^/]+/study\.json", "json", 1),
    ("summary: analysis.json", r"captures/[^/]+/summaries/[^/]+/analysis\.json", "json", 1),
    ("summary: checksums.json", r"captures/[^/]+/summaries/[^/]+/checksums\.json", "json", 1),
    ("summary: features.parquet", r"captures/[^/]+/summaries/[^/]+/features\.parquet", "", 1),
    ("summary: digest of the study", r"captures/[^/]+/summaries/[^/]+\.json", "json", 1),
    ("capture: capture.json", r"captures/[^/]+/capture\.json", "json", 2),
    ("capture: journal.jsonl", r"captures/[^/]+/journal\.jsonl", "json", 2),
    ("capture: extractions.jsonl", r"captures/[^/]+/extractions\.jsonl", "json", 2),
    ("capture: chunks", r"captures/[^/]+/activations\.zarr/[^/]+/c\.\d.*", "", 2),
    ("capture: side arrays", r"captures/[^/]+/activations\.zarr/[^/]+/c/.*", "", 2),
    ("capture: zarr.json", r"captures/[^/]+/activations\.zarr/(.*/)?zarr\.json", "json", 2),
    ("capture: lock", r"captures/[^/]+/lock", "", 2),
    ("corpus: token_ids.npy", r"corpora/[^/]+/token_ids\.npy", "", 3),
    ("corpus: lengths.npy", r"corpora/[^/]+/lengths\.npy", "", 3),
    ("corpus: starts.npy", r"corpora/[^/]+/starts\.npy", "", 3),
    ("corpus: texts and description", r"corpora/[^/]+/.*\.json", "json", 3),
    ("model: what is known of it", r"models/[^/]+/info-.*\.json", "json", 3),
    ("model: what was checked of it", r"models/[^/]+/complete-.*\.json", "json", 3),
    ("model: hashes", r"models/hashes/.*", "json", 3),
    ("model: made of a GGUF file", r"models/[^/]+/gguf[^/]*/.*", "json", 3),
    ("studies: what a step is given", r"studies/.*\.json", "json", 3),
    ("jobs: how they ended", r"jobs/[^/]+/\d+/(exit|error|cancel|started|job|result)\.json", "json", 3),
    ("jobs: events, locks", r"jobs/.*", "", 3),
    ("own: what pages were rendered with", r"own/[^/.]+\.page\.json", "json", 0),
    ("own: names", r"own/[^/.]+\.json", "json", 0),
    ("workspace.json", r"workspace\.json", "json", 0),
    ("instance: the name of this disk", r"instance", "", 3),
    ("Prefect's own", r"prefect/.*", "", 0),
)
DAMAGES = ("bit flip", "truncation", "zeros", "deletion", "edit")
"""`edit`: another number in valid JSON, where the file is JSON."""


def kind_of(path: str) -> tuple[str, str, str, int]:
    """The kind of a file, by its path below the workspace. KeyError for one that the table doesn't know."""
    for kind in KINDS:
        if re.fullmatch(kind[1], path):
            return kind
    raise KeyError(f"{path} is of no kind that tests/support/damage_table.py knows: give it a row")


def files_of(root: Path) -> dict[str, list[Path]]:
    """kind -> the files of a workspace, below it."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            place = path.relative_to(root)
            found.setdefault(kind_of(str(place))[0], []).append(place)
    return found


@dataclass(frozen=True)
class Case:
    """One damage of one file: a row, a file below the workspace, the state, and the damage."""

    kind: str
    file: Path
    state: str
    damage: str


def cases(root: Path) -> Iterator[Case]:
    """Every case of a workspace: of each kind one file, of the capture and the summary one of each name."""
    for name, _, form, state in KINDS:
        for file in _some(files_of(root).get(name, [])):
            for damage in DAMAGES:
                if damage != "edit" or (form == "json" and file.suffix in (".json", ".jsonl")):
                    yield Case(name, file, STATES[state], damage)


def _some(files: list[Path]) -> list[Path]:
    """Of files that differ in numbers alone, the last one."""
    return list({re.sub(r"\d+", "", path.name) + str(path.parent.name): path for path in files}.values())


def damage(path: Path, how: str, seed: int) -> None:
    """Damage a file in one way."""
    chance, content = random.Random(seed), bytearray(path.read_bytes())
    if how == "deletion":
        path.unlink()
    elif how == "truncation":
        path.write_bytes(content[: len(content) // 2])
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    elif how == "bit flip":
        if content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    else:
        path.write_text(_edited(content.decode()))


def _edited(text: str) -> str:
    """JSON, or the first of its lines, with its first number changed; where there is none, with a text changed."""
    line, rest = (text, "") if text.lstrip().startswith("{\n") or "\n" not in text.strip() else text.split("\n", 1)
    for old, new in ((r'(": ?)(\d)', r"\g<1>7\g<2>"), (r'(": ?")', r"\g<1>x")):
        changed, count = re.subn(old, new, line, count=1)
        if count:
            return changed + ("\n" + rest if rest else "")
    return text + " "


class World:
    """A finished study in a workspace of its own, and what it answers."""

    def __init__(
        self, place: Path, *, published: bool = False, model: str | None = None, text: Path | None = None
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        if text is None:
            text = place / "book.txt"
            text.write_text("The quick brown fox — jumps over the lazy dog, “twice”.\n" * 600)
        folder = model or tiny.make_model(place / "llama", num_hidden_layers=2)
        parts = {"capture": {"sites": ["attn_in", "resid"]}, "criteria": {"site": "attn_in"}}
        target = {"publish_to": f"file://{place}/store"} if published else {}
        self.spec = StudySpec.model_validate(tiny.spec_for(folder, text, sequences=2, length=16, **parts, **target))
        self.root, self.store = place / "ws", place / "store"
        self.told, how = self.ask(self.root)
        assert how == "computed", how
        self.again, _ = self.ask(self.root)

    def ask(self, root: Path, *, draws: bool = True) -> tuple[dict[str, Any], str]:
        """What the study answers in a workspace, and what was done for it; as the command does it, without Prefect.

        draws: whether a report is drawn where results are written, which takes most of the time and is in no number.
        """
        workspace = open_workspace(root)
        prepared = prepare(self.spec, workspace)
        folder = workspace.study(prepared.study_id)
        if not draws:
            # the report of a study that is not known to have been reported is not written while it is looked for
            for record in (root / "captures").glob("*/summaries/*.json"):
                record.unlink()
        before = _dates(folder)
        outcome, how = find_outcome(prepared, workspace), "answered"
        if outcome is None:
            how = "written again"
            if find_finished(prepared, workspace) is None:
                how = self._steps(prepared, workspace, draws)
                if not draws:
                    return _numbers(root / "light"), how
            target = self.spec.publish_to
            slug = model_slug(prepared.model.source.id)
            url = publish(folder, target, slug) if target else None
            outcome = make_outcome(prepared, workspace, published=url, cached=False)
        elif before != (after := _dates(folder)):
            how = "fetched again" if self.spec.publish_to else "written again"
            changed = {Path(path).name for path, date in after.items() if before.get(path) != date}
            if changed - {MANIFEST} and not changed & {*NUMBERS, PICTURES}:
                how = "rendered again"
        assert outcome.systematic == json.loads((folder / "summary.json").read_bytes())["systematic"]
        return _numbers(folder), how

    def _steps(self, prepared: Prepared, workspace: Workspace, draws: bool) -> str:
        """The steps on the machine, of which each does what is missing."""
        machine = LocalMachine(workspace.root, "here")
        prepared = read_prepared(Path(send_study(quiet_run(prepared, workspace), machine)), workspace)
        how = "written again"
        if not has_summary(workspace.summary(prepared.capture_id, prepared.study_id)):
            begun = (workspace.capture(prepared.capture_id) / "journal.jsonl").exists()
            read = run_extract(prepared, workspace, Silent())["sequences"]
            run_analyze(prepared, workspace, Silent())
            how = ("computed in part" if begun else "computed") if read else "counted again"
        if draws:
            run_report(prepared, workspace, Silent())
        else:
            write_results(prepared, workspace, workspace.root / "light")
        return how

    def outcome_of(self, case: Case, seed: int = 0, *, draws: bool = False) -> str:
        """What comes of a case, in a copy of the workspace: what was done, or the error. AssertionError for another answer."""
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "ws"
            shutil.copytree(self.root, root, copy_function=shutil.copy2)
            _remove(root, case.state)
            if not (root / case.file).exists():
                return "not read"
            damage(root / case.file, case.damage, seed)
            try:
                told, how = self.ask(root, draws=draws)
            except OutliersError as error:
                assert str(error), case
                return f"refused ({type(error).__name__})"
            assert told == self.told, f"{case} changed the answer"
            return how


def _numbers(folder: Path) -> dict[str, str]:
    """The digest of all numbers and of the files that hold them: whatever wrote them."""
    names = ("summary.json", "tokens.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names} | {
        "results_digest": results_digest(folder)
    }


def _dates(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _remove(root: Path, state: str) -> None:
    level = STATES.index(state)
    if level >= 1:
        shutil.rmtree(root / "results", ignore_errors=True)
    if level >= 2:
        for folder in (root / "captures").glob("*/summaries"):
            shutil.rmtree(folder)
    if level >= 3:
        shutil.rmtree(root / "captures", ignore_errors=True)


def table(worlds: Sequence[World]) -> str:
    """The table as Markdown: a row a kind of file, a column a damage."""
    cells: dict[tuple[str, str], dict[str, None]] = {}
    counted = 0
    for world in worlds:
        for number, case in enumerate(cases(world.root)):
            if world.spec.publish_to and not case.kind.startswith("results"):
                continue  # what is published has a part in no other
            cells.setdefault((case.kind, case.damage), {})[world.outcome_of(case, number)] = None
            counted += 1
    lines = ["| file | what else is gone | " + " | ".join(DAMAGES) + " |", "|---" * (len(DAMAGES) + 2) + "|"]
    for name, _, _, state in KINDS:
        found = [" or ".join(cells.get((name, how), {})) or "–" for how in DAMAGES]
        lines.append(f"| {name} | {'–' if state == 0 else STATES[state]} | {' | '.join(found)} |")
    return "\n".join([*lines, "", f"{counted} cases."])


def with_jobs(root: Path) -> None:
    """Add a job that has ended to a workspace, as a study leaves some."""
    handle = jobs.start(root, jobs.JobSpec("report-0", ("true",)))
    jobs.result(handle.folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = [World(Path(place) / "here"), World(Path(place) / "published", published=True)]
        with_jobs(made[0].root)
        print(table(made))
