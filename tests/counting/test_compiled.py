"""Compiled loops that are kept: a change of one file reaches the loops of the others that hold what it has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import outliers

SCRIPT = """
import numpy as np
from outliers import kernel_massive
rows = kernel_massive.above(np.array([[1, 4, 5, 9]], np.uint16), 4)[0]
stats = kernel_massive.above.stats
print(kernel_massive.__file__, rows.size, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_a_change_in_another_file_is_compiled_in(tmp_path):
    """numba looks at a function's own file alone: without more, `above` would go on with the `at_least` that it was made with."""
    copy = tmp_path / "outliers"
    shutil.copytree(Path(outliers.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def found():
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment | {"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        place, *numbers = done.stdout.rsplit(maxsplit=3)
        assert place == str(copy / "kernel_massive.py")
        return [int(number) for number in numbers]

    assert found() == [2, 0, 1]
    assert found() == [2, 1, 0], "it was not kept"
    shared = copy / "compiled.py"
    changed = shared.read_text().replace("least = np.uint16(limit)", "least = np.uint16(limit - 1)")
    assert changed != shared.read_text()
    shared.write_text(changed)
    assert found() == [3, 0, 1]
