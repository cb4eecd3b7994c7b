"""`outliers completion SHELL`, and what the shell gets when a person presses Tab.

argcomplete asks the command itself, so that every option is there without a list of its own. Here are only the words that a
parser does not know: the values of an option, several of them with commas, and the studies and captures of the workspace.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from outliers.spec import READINGS, SITES
from outliers.spec.formats import BASES, PRESETS
from outliers.workspace import Workspace, default_root

SHELLS = ("bash", "zsh", "fish")
MODELS = ("builtin:smollm2",)
CORPORA = ("builtin:python-docs",)
MAX_OFFERED = 200
"""Studies or captures that are offered."""

_HELP = """Print a script that makes the shell complete commands, options, values, and the ids of studies and captures.

  bash   add to ~/.bashrc:                    eval "$(outliers completion bash)"
  zsh    add to ~/.zshrc, after compinit:     eval "$(outliers completion zsh)"
  fish   once:                                outliers completion fish > ~/.config/fish/completions/outliers.fish
"""

Completer = Callable[..., Iterable[str]]


def add_completion_parser(verbs: Any, text: str) -> None:
    """Add `completion SHELL`."""
    parser = verbs.add_parser(
        "completion",
        help=text,
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def script(shell: str) -> str:
    """What a shell has to run to complete the command `outliers`."""
    from argcomplete.shell_integration import shellcode

    return shellcode(["outliers"], shell=shell)


def asked_words() -> list[str]:
    """The words of the line that a shell wants completed, without the command's own."""
    line = os.environ.get("COMP_LINE", "")
    try:
        words = shlex.split(line)
    except ValueError:  # a quotation mark that is not closed yet
        words = line.split()
    return words[1:]


def answer(parser: argparse.ArgumentParser) -> None:
    """Give the shell its completions, and end the process. It writes nothing else."""
    import argcomplete

    _add_completers(parser)
    argcomplete.autocomplete(parser, always_complete_options="long")


def _add_completers(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:  # argparse has no public list of a parser's options; argcomplete reads this one too
        if isinstance(action, argparse._SubParsersAction):
            for own in dict.fromkeys(action.choices.values()):
                _add_completers(own)
        elif (completer := _completer(action)) is not None:
            # the attribute is argcomplete's; argparse's class has none of that name
            action.completer = completer  # type: ignore[attr-defined]


def _completer(action: argparse.Action) -> Completer | None:
    """What completes the value of an option; None where the shell's own files do, or nothing."""
    name = action.dest.rpartition(".")[2]
    if name in _LISTS:
        return _several(_LISTS[name])
    if name in _WORDS:
        return _one(_WORDS[name])
    if name in ("study", "run"):
        return _studies
    if name in ("capture", "capture_id"):
        return _captures
    shown = action.metavar
    if isinstance(shown, str) and shown.startswith("{"):
        return _one(shown.strip("{}").split(","))
    return None


_LISTS: dict[str, Sequence[str]] = {"sites": SITES, "formats": (*BASES, *PRESETS), "layers": ("all",)}
_WORDS: dict[str, Sequence[str]] = {
    "id": MODELS,
    "model": MODELS,
    "source": CORPORA,
    "site": (*SITES, "block"),
    "reading": READINGS,
}


def _one(words: Sequence[str]) -> Completer:
    def complete(prefix: str, **_: Any) -> list[str]:
        return [word for word in words if word.startswith(prefix)]

    return complete


def _several(words: Sequence[str]) -> Completer:
    """Of values with commas the last one, and none twice."""

    def complete(prefix: str, **_: Any) -> list[str]:
        before, comma, last = prefix.rpartition(",")
        there = before.split(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last) and word not in there]

    return complete


def _studies(prefix: str, parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    return _names(_place(parsed_args).results, prefix, "manifest.json")


def _captures(prefix: str, parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    return _names(_place(parsed_args).captures, prefix, "")


def _place(arguments: argparse.Namespace | None) -> Workspace:
    """The workspace that the line names; it is not made here."""
    named = getattr(arguments, "workspace", None)
    return Workspace(Path(named).expanduser() if named else default_root())


def _names(folder: Path, prefix: str, inside: str) -> list[str]:
    """Names in a folder of the workspace; none where it can't be read, for a shell shows no errors."""
    try:
        found = sorted(
            item.name for item in folder.iterdir() if item.name.startswith(prefix) and (item / inside).exists()
        )
    except OSError:
        return []
    return found[:MAX_OFFERED]
