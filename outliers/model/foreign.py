"""Errors that other libraries raise for a user's file, as one error of this project with its reason in one line.

transformers, tokenizers, safetensors and gguf read files that a person made or copied. For a bad one they raise whatever
their code runs into: a KeyError, a struct.error, a RecursionError, a bare Exception, or a Rust panic, which is not even
an Exception. Every call in which such a library reads a file runs inside `foreign`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from outliers.errors import BadInput, OutliersError, UnknownModel

LONGEST = 300
"""Characters of another library's message that are shown."""


@contextmanager
def foreign(what: str, refuse: type[BadInput] = UnknownModel) -> Iterator[None]:
    """Turn what another library raises inside the block into `refuse`: `what`, and the reason in one line.

    Errors of this project pass as they are, and so do an interrupt, the end of the process and a GPU out of memory.
    """
    try:
        yield
    except OutliersError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise  # torch's: the caller says how much was needed
        raise refuse(f"{what}: {reason(error)}") from error
    except BaseException as error:
        # a panic of Rust code; its class can't be imported
        if type(error).__name__ != "PanicException":
            raise
        raise refuse(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error in one line: its message, with its class where the message says too little."""
    words = " ".join(str(error).split())[:LONGEST]
    return words if isinstance(error, OSError | ImportError) and words else f"{type(error).__name__}: {words}"
