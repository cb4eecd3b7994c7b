"""Turns errors of torch and transformers, while weights are read and the model runs, into errors of this project with a remedy.

Exhausted memory and missing packages have many forms: classes, texts of a RuntimeError, an OSError's number, an entry in a
report that transformers only logs. This module recognises all of them.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from outliers.errors import MemoryFull, PlanRefused

_FULL = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|failed to allocate memory"
    r"|you tried to allocate|unable to allocate|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""Texts of torch's allocators for processor and CUDA, of its libraries, of numpy, and of the operating system."""
_TOO_OLD = re.compile(r"no kernel image is available|invalid device function", re.IGNORECASE)
_MOST = 300
_CONVERSION = "automatic conversion of the weights"
_LOADER = "transformers.modeling_utils"


class _Report(logging.Handler):
    """Keeps what transformers logs of a load: only there are the exceptions of its conversions."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def memory_message(error: BaseException) -> str | None:
    """The message of the library if `error` was raised because memory ran out, else None."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        said = str(one).strip()
        full = isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        # torch.OutOfMemoryError is a RuntimeError whose text says so; no torch is loaded for a step that has none
        named = any(kind.__name__ == "OutOfMemoryError" for kind in type(one).__mro__)
        if full or named or (isinstance(one, Exception) and _FULL.search(said)):
            return _line(said) or type(one).__name__
        one = one.__cause__ or one.__context__
    return None


def _line(text: str) -> str:
    """The first line about memory, else the first line; cut to _MOST characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    chosen = next((line for line in lines if _FULL.search(line)), lines[0] if lines else "")
    return chosen[:_MOST]


@contextmanager
def explained(what: str, memory_remedy: str, import_remedy: str) -> Iterator[None]:
    """Raise errors of the libraries inside the block as errors of this project.

    what: the subject of the sentence, such as `the forward pass of NAME`. Raises MemoryFull if memory ran out, PlanRefused for
    a missing package and for GPUs that this torch was not built for; other errors unchanged.
    """
    report = _Report()
    logger = logging.getLogger(_LOADER)
    level, quiet = logger.level, not logger.isEnabledFor(logging.WARNING)
    logger.addHandler(report)
    if quiet:  # recorded here, but not shown
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield
    except (RuntimeError, MemoryError, OSError, ImportError, ValueError) as error:
        said = memory_message(error)
        if said is None and _CONVERSION in str(error) and _FULL.search(report.text):
            said = _line(report.text)
        if said is not None:
            raise MemoryFull(f"{what} has no memory left ({said}): {memory_remedy}") from error
        if isinstance(error, ImportError):
            raise PlanRefused(
                f"{what} needs a package that can't be imported ({_line(str(error))}): install it for {sys.executable} on "
                f"the machine that computes, or {import_remedy}"
            ) from error
        if _TOO_OLD.search(str(error)):
            raise PlanRefused(
                f"{what}: this torch was not built for the GPU ({_line(str(error))}): install a torch that is, or give "
                "--gpu-count 0 to compute without"
            ) from error
        raise
    finally:
        logger.removeHandler(report)
        if quiet:
            logger.setLevel(level)
            logger.propagate = True
