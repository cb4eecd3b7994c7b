"""The cache of compiled loops: a change in one file recompiles the loops of the other files that use it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import outliers

SCRIPT = """
import numpy as np
from outliers.counting.kernels import compiled, massive
before = compiled.is_cached(massive.above)
rows = massive.above(np.array([[1, 4, 5, 9]], np.uint16), 4)[0]
stats = massive.above.stats
hits, misses = sum(stats.cache_hits.values()), sum(stats.cache_misses.values())
print(massive.__file__, rows.size, hits, misses, before, compiled.is_cached(massive.above))
"""


def test_a_change_in_another_file_is_compiled_in(tmp_path):
    """numba checks only a function's own file: on its own, it would keep `above` with the old `at_least` in it."""
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
        place, *values = done.stdout.rsplit(maxsplit=5)
        assert place == str(copy / "counting" / "kernels" / "massive.py")
        return [*map(int, values[:3]), *values[3:]]

    assert found() == [2, 0, 1, "False", "True"]
    assert found() == [2, 1, 0, "True", "True"], "it was not cached"
    shared = copy / "counting" / "kernels" / "compiled.py"
    changed = shared.read_text().replace("least = np.uint16(limit)", "least = np.uint16(limit - 1)")
    assert changed != shared.read_text()
    shared.write_text(changed)
    assert found() == [3, 0, 1, "False", "True"]


TWICE = """
import json
import numpy as np
from outliers.counting.accumulate import Span, Tally, is_compiled
from outliers.counting.kernels import hits, spans, tile, totals
from outliers.corpus.kinds import KINDS
from outliers.counting.summary import Frame
before = is_compiled()
frame = Frame("x", "bfloat16", (("attn_in", 64), ("mlp_in", 64)), 1, 40, 6.0, (6.0,), "block")
values = np.full((40, 64), 0x40E0, np.uint16)
tiles = lambda layer: iter([{"attn_in": values, "mlp_in": values}])
Tally(frame).count(Span(0, 0, 40, np.zeros((len(KINDS), 40), np.bool_)), range(1), tiles, 40)
entries = [tile._count_tile, totals._flush, totals._flush_block, spans._count_union, spans._find_top_tokens]
print(json.dumps([before, is_compiled(), *[sum(e.stats.cache_misses.values()) for e in entries]]))
"""


@pytest.mark.studies
def test_a_later_process_compiles_nothing(tmp_path):
    """Loops that are given tuples come from the cache too."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    found = [
        json.loads(
            subprocess.run([sys.executable, "-c", TWICE], env=environment, stdout=subprocess.PIPE, check=True).stdout
        )
        for _ in range(2)
    ]
    assert found == [[False, True, 1, 1, 1, 1, 1], [True, True, 0, 0, 0, 0, 0]]
