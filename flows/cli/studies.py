"""The options of `outliers study` and `outliers plan`: every field of a StudySpec."""

from __future__ import annotations

import argparse
from typing import Any

from flows.cli.options import add_spec_options, add_track_option
from flows.cli.parser import EXAMPLES


def add_study_parser(verbs: Any, text: str) -> None:
    """Add `study`."""
    study = _add(verbs, "study", text)
    add_track_option(study)
    study.add_argument("--print-spec", action="store_true", help="print the StudySpec as JSON and stop")


def add_plan_parser(verbs: Any, text: str) -> None:
    """Add `plan`."""
    _add(verbs, "plan", text)


def _add(verbs: Any, verb: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        verb,
        help=text,
        description=text,
        usage=f"outliers {verb} --model MODEL [options]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
    )
    add_spec_options(parser)
    return parser
