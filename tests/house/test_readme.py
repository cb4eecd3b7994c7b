"""Every command that the README names is run here, or is one that another test runs, named below."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.options import read_spec
from flows.cli.parser import build_parser
from flows.server.served import SEED

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

# make demo's own command is run by test_the_demo; make test is what runs this
MAKE = {"make demo", "make test"}
# each is what tests/support/prefect_home.py or tests/flows/test_deployment.py does, with other parameters
PREFECT = {
    "prefect server start --host 127.0.0.1": '"server", "start", "--host", "127.0.0.1"',
    "prefect work-pool create outliers --type process": '"work-pool", "create", "outliers", "--type", "process"',
    "prefect --no-prompt deploy --all": '"--no-prompt", "deploy", "--all"',
    "prefect worker start --pool outliers": '"worker", "start", "--pool", "outliers"',
    "prefect deployment run": '"deployment", "run", "study/study"',
    "prefect flow-run retry": '"flow-run", "retry"',
}

# of the sweeps, which are beside the README and not where its reader works
ELSEWHERE = {"outliers sweep sweeps/moe.toml --dry-run": ("flows/test_sweep_flow.py", '"--dry-run"')}


def commands():
    """The lines of the README's shell blocks, in their order."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def environment(folder, workspace):
    clean = {k: v for k, v in os.environ.items() if k == SEED or not k.startswith(("AWS_", "PREFECT_", "OUTLIERS_"))}
    return clean | {"PATH": f"{BIN}:{clean['PATH']}", "HOME": str(folder), "OUTLIERS_WORKSPACE": str(workspace.root)}


def test_the_other_commands_are_run_elsewhere():
    text = "".join(
        (ROOT / "tests" / name).read_text() for name in ("support/prefect_home.py", "flows/test_deployment.py")
    )
    makefile = (ROOT / "Makefile").read_text()
    others = [line for line in commands() if not line.startswith(("outliers", "python"))]
    assert others
    for line in others:
        if line in MAKE:
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)
            continue
        (found,) = [code for start, code in PREFECT.items() if line.startswith(start)]
        assert found in text


def test_what_is_left_to_other_tests_is_there():
    for line, (name, text) in ELSEWHERE.items():
        assert line in commands()
        assert text in (ROOT / "tests" / name).read_text()


def demo_command():
    """The words of `make demo`'s own command, after `outliers`."""
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = re.search(r"outliers (study (?:.*\\\n)*.*)", recipe)
    assert command
    return shlex.split(command[1].replace("\\\n", " "))


def test_the_commands_have_options_that_there_are(tmp_path, monkeypatch):
    """Read as the program reads them, and the demo's too; `make test-studies` runs them."""
    monkeypatch.chdir(tmp_path)
    typed = [shlex.split(line.partition(" > ")[0])[1:] for line in commands() if line.startswith("outliers")]
    assert len(typed) >= 10
    for words in (*typed, demo_command()):
        arguments = build_parser().parse_args(words)
        if arguments.verb in ("study", "plan"):
            assert read_spec(arguments).model.id
    with pytest.raises(SystemExit):
        build_parser().parse_args([*demo_command(), "--no-such-option"])


@pytest.mark.servers
@pytest.mark.studies
def test_the_commands_do_what_the_readme_says(tmp_path, smollm2_workspace):
    """In order, in one folder, as a reader would; with a model of the hub only as far as it goes without the hub."""
    (tmp_path / "notes.txt").write_text("Call me Ishmael. Some years ago - never mind how long precisely. " * 60)
    known = environment(tmp_path, smollm2_workspace)
    ran = 0
    for line in commands():
        if not line.startswith(("outliers", "python")) or line in ELSEWHERE:
            continue
        hub = "Qwen/" in line
        typed = f"{line} --print-spec" if hub and " study " in line else line
        done = subprocess.run(
            ["bash", "-c", typed], cwd=tmp_path, env=known, capture_output=True, text=True, check=False
        )
        if hub and " plan " in line:
            # refused with a clear message where there is no hub
            assert (done.returncode, "the hub is switched off" in done.stderr) == (2, True), done.stderr
        else:
            assert done.returncode == 0, f"{typed}\n{done.stderr}"
        ran += 1
    assert ran >= 10
    assert (tmp_path / "study.json").exists()


@pytest.mark.servers
@pytest.mark.studies
def test_the_demo(tmp_path, smollm2_workspace):
    """The very command of `make demo`, on fewer tokens and elsewhere, twice: a study, then the answer that is there already."""
    words = demo_command()
    assert words[words.index("--publish-to") + 1].startswith("file://")
    elsewhere = {"--workspace": str(smollm2_workspace.root), "--publish-to": f"file://{tmp_path}/my atlas"}
    for option, value in (elsewhere | {"--num-sequences": "4", "--sequence-length": "64"}).items():
        words[words.index(option) + 1] = value
    known = environment(tmp_path, smollm2_workspace)
    first = subprocess.run(["outliers", *words], env=known, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    said = " ".join(first.stdout.split())
    assert "1 systematic outlier feature by the reading pooled at block" in said
    # in float32: processors and numbers of threads sum in other orders
    found = re.search(r"\b247 +(\d+\.?\d*) +-(\d+\.?\d*) ", said)
    assert found, said
    assert all(11 < float(value) < 12.1 for value in found.groups())
    assert "Without the systematic features (247) the perplexity is" in said
    assert re.search(r"int8_token \(KL 0\.0", said) and "nvfp4 (KL 0." in said
    report = re.search(r"^report +(/.*/report.html)$", first.stdout, re.MULTILINE)
    assert report
    assert Path(report[1]).read_text().startswith("<!doctype html>")
    second = subprocess.run(["outliers", *words], env=known, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert second.returncode == 0
    assert "was there already: nothing had to run" in second.stdout
    size = sum(path.stat().st_size for path in (tmp_path / "my atlas").rglob("*") if path.is_file())
    assert size < 1_000_000
