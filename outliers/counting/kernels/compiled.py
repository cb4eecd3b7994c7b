"""How the inner loops of counting are compiled and kept, and what more than one of them knows: kinds of value, keys of tokens.

numba keeps what it compiled as long as the function's own file stays the same, but what it keeps holds the loops and the
numbers of other files too. So each is kept under a name with the digest of all these files, and a change of one is compiled
into every loop. Knows nothing of what is counted. After it: `kernels` and the `kernel_` files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numba import njit

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
"""Kinds of value: how bits become numbers."""
KEY_SHIFT = 17
"""A key is magnitude << 17 | (65535 - source) << 1 | sign: the largest has the largest magnitude, of the first source."""
LAST_SOURCE = 0xFFFF
FILES = sorted(Path(__file__).parent.glob("*.py"))
"""What the loops are made of."""
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()[:16]


def compiled(function):
    """Compiled at the first call and kept for later processes, where there is a folder for that: it takes seconds."""
    function.__qualname__ += f"-{_DIGEST}"
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available": neither beside the program nor in a home
        return njit(**options)(function)


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
