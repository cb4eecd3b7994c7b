"""What a shell gets when a person presses Tab, as the shell asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from flows.cli.completion import script


def completed(line: str, folder, **environment: str) -> list[str]:
    """The words that the command offers for `line`, by the protocol of argcomplete's own scripts."""
    into = folder / "offered"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(into),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli"], env=os.environ | asked | environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return into.read_text().split("\n")


def test_commands_options_and_values(tmp_path):
    assert completed("outliers capt", tmp_path) == ["captures"]
    assert completed("outliers study --num-se", tmp_path) == ["--num-sequences"]
    assert completed("outliers plan --sites attn_in,m", tmp_path) == ["attn_in,mlp_in"]
    # a quotation mark that is still open is no error
    assert completed("outliers study --dtype b", tmp_path) == ["bfloat16"]


def test_studies_of_the_workspace(tmp_path):
    for name, finished in (("3f2a91c05d6e7b84", True), ("3f2a000000000000", False), ("77d0c1a92e3b4f56", True)):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        if finished:
            (folder / "manifest.json").write_text("{}")
    assert completed("outliers runs show 3f", tmp_path, OUTLIERS_WORKSPACE=str(tmp_path)) == ["3f2a91c05d6e7b84"]
    elsewhere = tmp_path / "elsewhere"
    found = completed("outliers runs show 3f", tmp_path, OUTLIERS_WORKSPACE=str(elsewhere))
    assert found == [""] and not elsewhere.exists(), "a Tab makes no workspace"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell):
    text = script(shell)
    assert "outliers" in text and "_ARGCOMPLETE" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    subprocess.run([shell, "-n"], input=text, text=True, check=True, capture_output=True)
