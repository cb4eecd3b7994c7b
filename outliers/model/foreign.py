"""What other libraries raise at a file of a user's, as one error of ours: never a traceback of theirs.

transformers, tokenizers, safetensors and gguf read files that a person made or copied. What they raise at a bad one is
whatever their code ran into: a KeyError, a struct.error, a RecursionError, a bare Exception, or a Rust panic, which is no
Exception at all. Knows no file. Around every call that has such a library read one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from outliers.errors import BadInput, OutliersError, UnknownModel

LONGEST = 300
"""Characters of another library's message that are shown."""


@contextmanager
def foreign(said: str, refuse: type[BadInput] = UnknownModel) -> Iterator[None]:
    """Within: what another library raises becomes `refuse`, saying `said` and its reason in one line.

    Errors of this project pass as they are, and so do an interrupt, the end of the process and a GPU out of memory.
    """
    try:
        yield
    except OutliersError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise  # torch's: the caller tells how much was needed
        raise refuse(f"{said}: {reason(error)}") from error
    except BaseException as error:
        # a panic of Rust code; its class can't be imported
        if type(error).__name__ != "PanicException":
            raise
        raise refuse(f"{said}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error in one line: its message, with its class where the message alone says too little."""
    words = " ".join(str(error).split())[:LONGEST]
    return words if isinstance(error, OSError | ImportError) and words else f"{type(error).__name__}: {words}"
