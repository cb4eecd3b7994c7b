"""`outliers export`: a finished study in the formats that quantizers read.

Calls `outliers.export`; loads no model, and no torch unless a pickle is asked for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.cli.answers import Answers
from flows.cli.console import busy, line, size
from flows.cli.options import add_common_options

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.workspace import Workspace

FORMATS = (
    "imatrix",
    "imatrix-dat",
    "act-scales",
    "llm-compressor",
    "compressed-tensors",
    "bitsandbytes",
    "modelopt",
    "gptqmodel",
    "autoround",
    "torchao",
    "llama-quantize",
)
"""Those of `outliers.export.formats.TARGETS`, which is not imported for the sake of a help text."""
_EXAMPLES = """examples:
  outliers study --model builtin:smollm2 --corpus builtin:python-docs --sites attn_in,mlp_in,o_in,down_in
  outliers export STUDY --to imatrix --out smollm2.imatrix.gguf
  outliers export STUDY --to bitsandbytes --skip-above 100 --out quantization_config.json
  outliers export STUDY --to llm-compressor --scheme W8A8 --out recipe.yaml

docs/export.md has a table of the formats and what each needs.
"""


def add_export_parser(verbs: Any, text: str) -> None:
    """Add `export STUDY --to FORMAT --out FILE`."""
    export = verbs.add_parser(
        "export",
        help=text,
        description=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    export.add_argument(
        "study",
        nargs="?",
        metavar="STUDY",
        help="a study_id, or a results folder, as `outliers runs show` takes them (default: the study finished last)",
    )
    export.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    export.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write, outside of results")
    export.add_argument(
        "--scheme", default="", metavar="NAME", help="how the program quantizes; each format has a default"
    )
    export.add_argument(
        "--skip-above",
        type=float,
        metavar="X",
        help="leave modules alone whose input has a larger abs(x) anywhere; they are printed",
    )
    export.add_argument("--sums", action="store_true", help="imatrix: with sums of x")
    export.add_argument(
        "--smoothing",
        type=float,
        metavar="ALPHA",
        help="llm-compressor: SmoothQuant's strength; 0: none (default: 0.5 for W8A8)",
    )
    export.add_argument(
        "--full", action="store_true", help="bring the statistics of each column home from the study's machine first"
    )
    export.add_argument("--force", action="store_true", help="replace files that are there")
    add_common_options(export)


def export_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers export`. Raises BadInput and what machines raise."""
    from outliers.export.files import check_out, write_export
    from outliers.export.formats import ExportRequest, check_request, make_export
    from outliers.export.source import open_study

    request = ExportRequest(
        to=arguments.to,
        suffix=arguments.out.suffix,
        sums=arguments.sums,
        skip_above=arguments.skip_above,
        scheme=arguments.scheme,
        smoothing=arguments.smoothing,
    )
    check_request(request)
    check_out(arguments.out, workspace, force=arguments.force)
    study_id, capture_id, own = _find(arguments.study, workspace)
    if arguments.full:
        from outliers.export.bring import bring_summary

        with busy(console, "bringing statistics home"):
            machine = bring_summary(own, study_id, capture_id)
        if machine is not None:
            line(console, "brought", f"the statistics of each column, from {machine}")
    with busy(console, "reading the statistics"):
        made = make_export(open_study(own, study_id, capture_id), request)
        paths = write_export(made, arguments.out, force=arguments.force)
    if arguments.json:
        print(json.dumps({"study_id": study_id, "files": [str(path) for path in paths], "notes": made.lines}))
        return
    for path in paths:
        line(Answers(), "wrote", f"{path} ({size(path.stat().st_size)})")
    for text in made.lines:
        line(Answers(), "note", text)


def _find(name: str | None, workspace: Workspace) -> tuple[str, str, Workspace]:
    """(study_id, capture_id, the workspace that has the study) of a finished study. Raises BadInput.

    The results folder of another workspace leads to the statistics of that workspace.
    """
    from flows.cli.run_show import find_run, finished, newest
    from outliers.errors import BadInput
    from outliers.spec import STORE_SCHEMES
    from outliers.workspace import Workspace, open_workspace

    if name is not None and urlsplit(name).scheme in STORE_SCHEMES:
        raise BadInput(
            f"{name} is a published study, which has no statistics of columns: give the study's id in its workspace"
        )
    folder = (newest(workspace) if name is None else find_run(name, workspace)).absolute()
    found = finished(folder)
    own = workspace
    if folder.parent.name == "results" and folder.parent.parent != workspace.root:
        other = folder.parent.parent
        own = open_workspace(other) if (other / "workspace.json").is_file() else Workspace(other)
    return str(found.manifest["study_id"]), str(found.manifest["capture_id"]), own
