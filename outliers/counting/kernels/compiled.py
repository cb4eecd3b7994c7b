"""How the inner loops of counting are compiled and cached: under a name that has the digest of all files of this folder.

Knows nothing of what is counted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from outliers.compiling import compiler
from outliers.compiling import is_cached as is_cached

FILES = sorted(Path(__file__).parent.glob("*.py"))
"""The sources of the loops."""


compiled = compiler(FILES)


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
