"""The command's own face: what it imports before it knows what is asked, what it says of a slip, where its answers go."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from flows.cli.answers import Answers
from flows.cli.parser import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]


def test_help_imports_no_library_of_ours():
    code = (
        "import sys\nfrom flows.cli.command import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'torch', 'pydantic', 'httpx', 'pyarrow', 'prefect', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    named = re.findall(r"^    ([a-z]+)", done.stdout, re.MULTILINE)
    assert named == list(COMMANDS)


def test_one_command_is_built_or_all():
    for name in COMMANDS:
        alone, whole = build_parser([name]), build_parser()
        assert re.findall(r"^    [a-z]+ .*", alone.format_help()) == re.findall(r"^    [a-z]+ .*", whole.format_help())
    # the options of another command are not there
    with pytest.raises(SystemExit):
        build_parser(["runs"]).parse_args(["atlas", "--out", "x.html", "file:///a"])
    assert build_parser().parse_args(["atlas", "--out", "x.html", "file:///a"]).out == "x.html"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plna"], "(did you mean plan?)"),
        (["runs", "lsit"], "(did you mean list?)"),
        (["plan", "--mdoel", "x"], "unrecognized arguments: --mdoel x (did you mean --model?)"),
        (["runs", "list", "--jsno"], "unrecognized arguments: --jsno (did you mean --json?)"),
        (["captures", "list", "more"], "unrecognized arguments: more\n"),
        (["--qqqq", "study"], "--qqqq"),
    ],
)
def test_a_slip_ends_with_what_was_meant(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        build_parser(words).parse_args(words)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, said in printed.err) == ("", True), printed.err


def test_a_paragraph_is_broken_between_words_on_a_terminal_alone(capsys, monkeypatch):
    text = "perplexity 40.63 untouched. " * 20
    Answers().prose(text)
    assert capsys.readouterr().out == text + "\n"
    shown = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    answers = Answers(file=shown)
    monkeypatch.setattr(type(answers), "is_terminal", True)
    answers.prose(text, columns=50)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 50 and " ".join(lines).split() == text.split()


def example() -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    table.add_column("tokens", justify="right")
    table.add_row(Text("organisation/" + "a-long-name-" * 20), "1,024")
    table.add_row(Text("[red]b[/red]"), "8")
    return table


def test_a_table_is_whole_in_a_pipe_and_plain_for_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    Answers().table(example())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split() == ["organisation/" + "a-long-name-" * 20, "1,024"]
    assert lines[2].split() == ["[red]b[/red]", "8"]
    Answers(argparse.Namespace(plain=True)).table(example())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [
        ["model", "tokens"],
        ["organisation/" + "a-long-name-" * 20, "1,024"],
        ["[red]b[/red]", "8"],
    ]
    assert os.environ["COLUMNS"] == "80"
