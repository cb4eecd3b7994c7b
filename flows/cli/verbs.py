"""The commands that read or manage and run no study: what the command line calls for each, and the code it exits with."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.cli.exit_codes import DONE, FAILED
from flows.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console


def models_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers models inspect`."""
    from flows.cli.console import busy
    from flows.cli.models import inspect_model

    quiet_libraries()
    with busy(console, "building the model from its config, without weights"):
        info = inspect_model(arguments)
    if arguments.json:
        print(info.model_dump_json(exclude={"source": {"path"}}))
        return DONE
    from flows.cli.answers import Answers
    from flows.cli.models import show_model

    show_model(Answers(), info)
    return DONE


def captures_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers captures list|rm`."""
    from flows.cli.captures import list_command, remove_command
    from outliers.workspace import open_workspace

    workspace = open_workspace(arguments.workspace)
    (list_command if arguments.action == "list" else remove_command)(workspace, arguments, console)
    return DONE


def verify_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers verify`."""
    from flows.cli.captures import verify_command as verify
    from outliers.workspace import open_workspace

    return DONE if verify(open_workspace(arguments.workspace), arguments, console) else FAILED


def runs_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers runs list|show|compare`."""
    from flows.cli.runs import runs_command as runs
    from outliers.workspace import open_workspace

    runs(open_workspace(arguments.workspace), arguments, console)
    return DONE


def atlas_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers atlas`."""
    from flows.cli.atlas import atlas_command as atlas

    atlas(arguments, console)
    return DONE


def card_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers card`."""
    from flows.cli.card import card_command as card
    from outliers.workspace import open_workspace

    card(open_workspace(arguments.workspace), arguments, console)
    return DONE


def machines_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers machines`."""
    from flows.cli.machines import machines_command as act
    from outliers.workspace import open_workspace

    return DONE if act(open_workspace(arguments.workspace), arguments, console) else FAILED


def sweep_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers sweep`."""
    from flows.cli.sweeps import sweep_command as sweep

    quiet_libraries()
    return sweep(arguments, console)


def advise_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers advise`."""
    from flows.cli.probes import advise_command as show
    from outliers.workspace import open_workspace

    show(open_workspace(arguments.workspace), arguments, console)
    return DONE


def report_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers report`."""
    from flows.cli.report import report_command as report
    from outliers.workspace import open_workspace

    report(open_workspace(arguments.workspace), arguments, console)
    return DONE


def export_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers export`."""
    from flows.cli.export import export_command as export
    from outliers.workspace import open_workspace

    export(open_workspace(arguments.workspace), arguments, console)
    return DONE


def completion_command(arguments: argparse.Namespace, console: Console, argv: list[str]) -> int:
    """`outliers completion`."""
    from flows.cli.completion import script

    print(script(arguments.shell))
    return DONE
