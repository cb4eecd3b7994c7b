"""docs/recipes.md, typed from top to bottom: its commands have options that there are, and do what they say."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from flows.cli.options import read_spec
from flows.cli.parser import build_parser
from tests.house.test_readme import environment

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
SCRIPTS = {name: "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)) for name, text in RECIPES.items()}


def typed(script: str) -> list[list[str]]:
    """The words of each `outliers` command of a script."""
    outside = re.sub(r"<<'END'\n.*?\nEND\n", "\n", script, flags=re.DOTALL)
    return [shlex.split(line)[1:] for line in outside.splitlines() if line.startswith("outliers")]


def test_the_list_at_the_top_is_of_the_recipes():
    anchors = re.findall(r"^- \[.*?\]\(#(.*?)\)", PAGE, re.MULTILINE)
    assert anchors == [re.sub(r"[^a-z -]", "", name.lower()).replace(" ", "-") for name in RECIPES]


def test_the_commands_have_options_that_there_are():
    words = [line for script in SCRIPTS.values() for line in typed(script)]
    assert len(words) > 15
    for line in words:
        arguments = build_parser().parse_args(line)
        if arguments.verb in ("study", "plan"):
            assert read_spec(arguments).model.id


@pytest.mark.servers
@pytest.mark.studies
@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if typed(script)])
def test_a_recipe_is_typed_from_top_to_bottom(tmp_path, smollm2_workspace, name):
    """What names a model of the hub is left out: tests/study/test_layers_table.py holds its figures."""
    (tmp_path / "notes.txt").write_text("Call me Ishmael. Some years ago - never mind how long precisely. " * 400)
    script = "\n".join(line for line in SCRIPTS[name].splitlines() if "Qwen/" not in line)
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env=environment(tmp_path, smollm2_workspace),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()


@pytest.mark.servers
@pytest.mark.studies
def test_the_notebook(smollm2_workspace, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (block,) = re.findall(r"```python\n(.*?)```", RECIPES["In a notebook"], re.DOTALL)
    shown: list[object] = []
    exec(block, {"WORKSPACE": str(smollm2_workspace.root), "print": shown.append})
    (largest,) = shown
    assert largest.shape == (30,) and largest.max() > 6
