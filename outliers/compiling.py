"""How inner loops are compiled, and cached on disk.

numba reuses a cached function as long as the function's own file is unchanged, but the cached code contains loops and
constants of other files too. So every function is cached under a name that has the digest of all files that it is made of: a
change in one of them recompiles every loop. Knows nothing of what is computed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import njit


def compiler(files):
    """A decorator that compiles a function whose loops and constants are all in `files`."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]

    def compiled(function):
        """Compile a function at its first call, which takes seconds; cache it where a folder can be written."""
        function.__qualname__ += f"-{digest}"
        options = {"nogil": True, "error_model": "numpy"}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            # "cannot cache function: no locator available": neither the program's folder nor the user's can be written
            return njit(**options)(function)

    return compiled


def is_cached(function: Any) -> bool:
    """Whether a `compiled` function, from these very files, is in the cache of this machine for any types of arguments."""
    folder = function.stats.cache_path
    name = f"{Path(function.py_func.__code__.co_filename).stem}.{function.py_func.__qualname__}-*.nbi"
    return folder is not None and any(Path(folder).glob(name))
