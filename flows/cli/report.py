"""`outliers report`: the report of a finished study, and its pictures as files for a paper.

Nothing is counted, and nothing in the results folder changes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from flows.cli.console import busy, line
from flows.cli.options import add_common_options

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.report.figures import Plot
    from outliers.workspace import Workspace

COLUMN = 3.4
"""`outliers.report.figures.COLUMN_INCHES`, which is not imported for the sake of a help text."""
_EXAMPLES = """examples:
  outliers report STUDY                                  where the page is
  outliers report STUDY --figures svg,pdf                one column wide, into ./figures-STUDY
  outliers report STUDY --figures pdf --width 7 --out paper/figures
  outliers report s3://atlas/runs/MODEL/STUDY --figures png
"""


def add_report_parser(verbs: Any, text: str) -> None:
    """Add `report STUDY --figures svg,pdf --out FOLDER`."""
    report = verbs.add_parser(
        "report",
        help=text,
        description=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    report.add_argument(
        "study",
        nargs="?",
        metavar="STUDY",
        help="a study_id, a results folder, or the URL of a published study (default: the study finished last)",
    )
    report.add_argument("--figures", metavar="A,B", help="write every picture as svg, pdf or png, several by commas")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where they are written (default: ./figures-STUDY)")
    report.add_argument(
        "--width", type=float, default=COLUMN, metavar="INCHES", help=f"of the pictures (default: {COLUMN}, one column)"
    )
    report.add_argument("--force", action="store_true", help="replace files that are there")
    add_common_options(report)


def report_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers report`. Raises BadInput where there is no such study, and what reading a store raises."""
    from outliers.errors import BadInput
    from outliers.report.paper import check_formats, check_width

    formats = () if arguments.figures is None else check_formats(arguments.figures.replace(" ", "").split(","))
    width = check_width(arguments.width)
    if not formats and arguments.out is not None:
        raise BadInput("--out is where figures go: say which, as --figures svg,pdf")
    study_id, page, files, folder = _read(arguments.study, workspace)
    if not formats:
        if arguments.json:
            print(json.dumps({"study_id": study_id, "report": page, "files": []}))
        else:
            line(Answers(), "report", page)
        return
    out = Path(f"figures-{study_id}") if arguments.out is None else arguments.out
    with busy(console, "drawing"):
        made = _draw(files, folder, formats, width)
    paths = _write(out, made, force=arguments.force)
    if arguments.json:
        print(json.dumps({"study_id": study_id, "report": page, "files": [str(path) for path in paths]}))
        return
    line(Answers(), "wrote", f"{len(paths)} files into {out}: {', '.join(sorted({p.stem for p in paths}))}")


def _read(name: str | None, workspace: Workspace) -> tuple[str, str, dict[str, bytes], Path | None]:
    """(study_id, where its page is, its numbers by name, its results folder where it is not a published one)."""
    from flows.cli.run_show import find_run, finished, newest, published_url
    from outliers.publish.allowlist import NUMBERS, check_numbers, number_names
    from outliers.publish.shelf import read_study

    url = None if name is None else published_url(name, workspace)
    if url is not None:
        study = read_study(url, NUMBERS)
        there = number_names([file["path"] for file in study.manifest["files"]])
        given = dict(study.files) | dict(read_study(url, there).files)
        page = f"{study.url}/{study.manifest['folder']}/report.html"
        return str(study.manifest["study_id"]), page, dict(check_numbers(given).files), None
    folder = newest(workspace) if name is None else find_run(name, workspace)
    found = finished(folder)
    numbers = {path: found.files[path] for path in number_names(found.files)}
    return str(found.manifest["study_id"]), str(folder / "report.html"), dict(check_numbers(numbers).files), folder


def _draw(files: Mapping[str, bytes], folder: Path | None, formats: tuple[str, ...], width: float) -> dict[str, bytes]:
    from outliers.errors import BadInput, DamagedResults
    from outliers.publish.probes import newest_probe
    from outliers.report.paper import make_figures
    from outliers.report.probe_page import probe_figures

    try:
        probe = None if folder is None else newest_probe(folder)
    except DamagedResults as error:
        raise BadInput(f"the newest probe of this study: {error}") from error

    def of_probe() -> Sequence[tuple[Plot, str]]:
        return () if probe is None else probe_figures(probe.probes, probe.sensitivity, probe.advice)

    return make_figures(files, formats, width, of_probe)


def _write(out: Path, made: Mapping[str, bytes], *, force: bool) -> list[Path]:
    from outliers.errors import BadInput
    from outliers.files.atomic import write_atomic

    if (out / "manifest.json").exists():
        raise BadInput(f"--out: {out} is a results folder, which holds nothing but what was published; give another")
    there = [name for name in made if (out / name).exists()]
    if there and not force:
        raise BadInput(f"--out: {out / there[0]} is there already; give another folder, or --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in made.items():
            write_atomic(out / name, data)
    except OSError as error:
        raise BadInput(f"--out: {out} can't be written: {error.strerror or error}") from error
    return [out / name for name in made]
