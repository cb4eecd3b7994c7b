"""`outliers card`: a study as a block for a model card, on standard output or in a file.

It reads a study where it is, and makes the card of what of it is published (`outliers.report.card`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from flows.cli.console import line
from flows.cli.options import add_common_options

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.workspace import Workspace

_EXAMPLES = """examples:
  outliers card
  outliers card 3f2a91c05d6e7b84 --out card.md
  outliers card s3://atlas/runs/Qwen--Qwen3-30B-A3B/3f2a91c05d6e7b84
"""


def add_card_parser(verbs: Any, text: str) -> None:
    """Add `card [STUDY]`."""
    card = verbs.add_parser(
        "card",
        help=text,
        description=f"{text}: YAML for the front matter, and Markdown. It holds what is published of a study and nothing else.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    card.add_argument(
        "study",
        metavar="STUDY",
        nargs="?",
        help="a study_id, a results folder, or a published study's URL or folder (default: the newest of the workspace)",
    )
    card.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: standard output)")
    card.add_argument("--force", action="store_true", help="replace the file if it is there")
    add_common_options(card)


def card_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers card`. Raises BadInput where there is no such study or the file can't be written, PublishRefused."""
    from flows.cli.run_show import study_with_summary
    from outliers.atlas.read import read_summary
    from outliers.atlas.verdict import best_advice
    from outliers.errors import BadInput
    from outliers.files.atomic import write_atomic
    from outliers.publish.stores.links import web_link
    from outliers.report.card import make_card

    out = None if arguments.out is None else _free(arguments.out.expanduser().absolute(), force=arguments.force)
    study = study_with_summary(arguments.study, workspace)
    summary = read_summary(study)
    made = make_card(summary, study.manifest, best_advice(study.verdicts, summary.study_id), web_link(study.url))
    if out is not None:
        try:
            write_atomic(out, made.text.encode())
        except OSError as error:
            raise BadInput(f"{out} can't be written: {error.strerror or error}") from error
    if arguments.json:
        told = {"study_id": summary.study_id, "front_matter": made.front_matter, "body": made.body}
        print(json.dumps(told | {"file": None if out is None else str(out)}))
    elif out is None:
        sys.stdout.write(made.text)
    else:
        line(Answers(), "wrote", str(out))


def _free(path: Path, *, force: bool) -> Path:
    """A file that may be written. Raises BadInput: a README that is there is somebody's own."""
    from outliers.errors import BadInput

    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else f"can't be written: there is no folder {path.parent}"
        raise BadInput(f"{path} {why}; give another file")
    if path.exists() and not force:
        raise BadInput(f"{path} is there already; give another file, or --force to replace it")
    return path
