"""The parser of the command: the options of the command that was asked for, and the names of the others.

Each command's own module adds its options. Only that one is imported: `outliers --help` imports none, and no command waits
for the libraries of another.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from outliers.names import nearest
from outliers.version import __version__

EXAMPLES = """examples:
  outliers study --model builtin:smollm2 --corpus builtin:python-docs --num-sequences 8 --sequence-length 512
  outliers study --model ./my-model --corpus notes.txt --num-sequences 16 --publish-to s3://atlas/runs
  outliers plan  --model Qwen/Qwen3-30B-A3B --num-sequences 4
  outliers models inspect Qwen/Qwen3-30B-A3B
  outliers runs show STUDY --feature 247
  outliers report STUDY --figures svg,pdf
  outliers probe STUDY --check
  outliers advise STUDY --budget 0.05
  outliers sweep sweeps/moe.toml --dry-run
  outliers machines add lab1 anna@gpu1.lab.example
  outliers captures list
  outliers verify CAPTURE

exit codes: 0 done, 1 failed, 2 refused before anything ran, 3 done but not tracked (--track), 130 ended by Ctrl-C
"""


class Command(NamedTuple):
    """One command: its line in `outliers --help`, and the function that adds its parser, as module:function."""

    help: str
    adder: str


COMMANDS = {
    "study": Command("run a study, or show the one that is there already", "flows.cli.studies:add_study_parser"),
    "plan": Command("say what a study would take; nothing is run or spent", "flows.cli.studies:add_plan_parser"),
    "models": Command("look at a model before anything is run", "flows.cli.models:add_models_parser"),
    "captures": Command("list the captures on this disk, or remove one", "flows.cli.captures:add_captures_parser"),
    "verify": Command(
        "check every checksum of a capture; nothing is changed without --repair",
        "flows.cli.captures:add_verify_parser",
    ),
    "runs": Command("read finished studies: list, show, compare", "flows.cli.runs:add_runs_parsers"),
    "report": Command(
        "say where a study's report is, or write its pictures for a paper", "flows.cli.report:add_report_parser"
    ),
    "export": Command(
        "write a finished study for a quantizer; no model is loaded, and nothing is published",
        "flows.cli.export:add_export_parser",
    ),
    "atlas": Command(
        "make one page and one table of every study published in one place", "flows.cli.atlas:add_atlas_parser"
    ),
    "card": Command("print a finished study as a block for a model card", "flows.cli.card:add_card_parser"),
    "merge": Command("join summaries of parts of one study into the whole", "flows.cli.merge:add_merge_parser"),
    "sweep": Command(
        "run many studies from one file, or say what they would take", "flows.cli.sweeps:add_sweep_parser"
    ),
    "machines": Command(
        "add hosts of your own; list and end machines that are held or rented",
        "flows.cli.machines:add_machines_parser",
    ),
    "probe": Command(
        "change a finished study's model in places and see what that does to its predictions",
        "flows.cli.probes:add_probe_parser",
    ),
    "advise": Command(
        "say what of a probed study's model can be quantized, how, and what must be left alone",
        "flows.cli.probes:add_advise_parser",
    ),
    "completion": Command(
        "print what makes a shell complete the command", "flows.cli.completion:add_completion_parser"
    ),
}

_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<known>.*)\)")
_NAME = re.compile(r"[\w-]+")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what was probably meant by a command or an option that is not known."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, and no word may be left over: the command that was asked for says it, with its own options."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = sorted(set(_OPTION.findall(self.format_help())))
            meant = "".join(nearest(word.partition("=")[0], known) for word in unknown if word[:1] == "-")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print the usage and the mistake, and end with REFUSED, which is argparse's code too."""
        found = _CHOICE.search(message)
        super().error(message + nearest(found["given"], _NAME.findall(found["known"])) if found else message)


def asked_command(argv: Sequence[str]) -> str | None:
    """The command that the words ask for; None for `--help`, `--version` and names that are not known."""
    word = next(iter(argv), "")
    return word if word in COMMANDS else None


def build_parser(argv: Sequence[str] | None = None) -> Parser:
    """The parser with the options of the command that `argv` asks for; without `argv`, with those of every command."""
    parser = Parser(
        prog="outliers",
        description="Find the systematic outlier features of a large language model, exactly.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"outliers {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=Parser)
    asked = None if argv is None else asked_command(argv)
    for name, command in COMMANDS.items():
        if argv is not None and name != asked:
            verbs.add_parser(name, help=command.help)
            continue
        module, _, function = command.adder.partition(":")
        getattr(importlib.import_module(module), function)(verbs, command.help)
    return parser
