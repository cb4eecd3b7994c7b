"""How the inner loops of counting are compiled and cached: under a name that has the digest of all files of this folder.

Knows nothing of what is counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from outliers.compiling import compiler

FILES = sorted(Path(__file__).parent.glob("*.py"))
"""The sources of the loops."""


compiled = compiler(FILES)


def is_cached(function: Any) -> bool:
    """Whether a `compiled` function, from these very files, is in the cache of this machine for any types of arguments."""
    folder = function.stats.cache_path
    name = f"{Path(function.py_func.__code__.co_filename).stem}.{function.py_func.__qualname__}-*.nbi"
    return folder is not None and any(Path(folder).glob(name))


@compiled
def at_least(bits, limit):
    """How many magnitudes of a run of values are at least `limit`."""
    found = np.uint32(0)
    if bits.itemsize == 2:
        least = np.uint16(limit)
        for r in range(bits.size):
            found += np.uint32((bits[r] & 0x7FFF) >= least)
    else:
        least = np.uint32(limit)
        for r in range(bits.size):
            found += np.uint32((bits[r] & 0x7FFFFFFF) >= least)
    return found
