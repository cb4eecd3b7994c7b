"""`make test-all`: every target has its turn, the table says what came of each, and the exit code is of all of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = """\
good:
\t@echo "2 passed, 1 skipped in 0.12s"
bad:
\t@echo "1 failed, 3 passed in 4.00s"; exit 2
skipped:
\t@echo "4 skipped in 0.05s"
twice:
\t@printf '\\033[32m5 passed\\033[0m\\033[32m in 1.00s (0:01:00)\\033[0m\\n'; echo "7 passed, 90 deselected in 61.20s"
quiet:
\t@true
"""


def heavy(folder, *targets):
    """What the script printed last, by targets, and its exit code."""
    (folder / "Makefile").write_text(MAKEFILE)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "heavy.py"), *targets],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    rows = [re.split(r"  +", line) for line in done.stdout.rpartition("\n\n")[2].splitlines()]
    return {row[0]: row[1:] for row in rows}, done


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_all_have_their_turn_and_a_failure_is_told(tmp_path):
    rows, done = heavy(tmp_path, "good", "bad", "skipped", "twice", "quiet", "absent")
    assert list(rows) == ["target", "good", "bad", "skipped", "twice", "quiet", "absent"]
    assert rows["good"] == ["passed", "0.0", "2 passed, 1 skipped in 0.12s"]
    assert rows["bad"] == ["failed (2)", "0.0", "1 failed, 3 passed in 4.00s"]
    # tests that were all skipped have shown nothing
    assert rows["skipped"] == ["nothing ran", "0.0", "4 skipped in 0.05s"]
    assert rows["twice"] == ["passed", "0.0", "5 passed in 1.00s; 7 passed, 90 deselected in 61.20s"]
    assert rows["quiet"] == ["passed", "0.0", "-"]
    assert rows["absent"][0] == "failed (2)"
    assert "No rule to make target" in done.stdout  # what a target says is shown
    assert done.returncode == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(
    ("targets", "code"), [(("good", "quiet"), 0), (("bad", "good"), 1), (("skipped",), 1), ((), 1)]
)
def test_the_exit_code_is_of_all(tmp_path, targets, code):
    assert heavy(tmp_path, *targets)[1].returncode == code


def test_every_heavy_target_is_one_of_all():
    """A target that is never run breaks unnoticed: all called test-... are run by test-all; two are a part of `make test`."""
    text = (ROOT / "Makefile").read_text()
    named = re.search(r"^ALL := (.*)$", text, re.MULTILINE)
    assert named
    targets = re.findall(r"^(test(?:-[a-z]+)?):", text, re.MULTILINE)
    assert sorted(named[1].split()) == sorted(set(targets) - {"test-all", "test-fast", "test-times"})
    assert named[1].split()[0] == "test"
