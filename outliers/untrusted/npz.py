"""Reads a .npz file of another machine's summary without trust: its arrays take no more memory than the file has bytes.

numpy allocates what an array's header claims before it reads a value, and unpacks whatever is packed. `np.savez` packs
nothing, so in a file that it wrote the bytes of every array confirm its header.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MAX_ARRAYS = 256
"""A summary has a few dozen."""
UNREADABLE = (
    ValueError,
    KeyError,
    IndexError,
    OSError,
    EOFError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for an invalid archive, or for one that lacks an array."""


@contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    """The arrays of a .npz file, by their names. Raises ValueError for a file that claims more than it holds, and what numpy and
    zipfile raise for another kind of file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_ARRAYS:
            raise ValueError(f"it holds {len(members)} arrays, at most {MAX_ARRAYS} are expected")
        if len({member.filename for member in members}) != len(members):
            raise ValueError("an array is there twice")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is packed, which no summary is")
            _check_member(archive, member, size)
        if sum(member.file_size for member in members) > size:
            raise ValueError("its arrays are larger than the file")
    with np.load(path, allow_pickle=False) as stored:
        yield stored


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> None:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"{member.filename} is an array of version {version}")
    # a Python product: it does not wrap around
    if math.prod(int(n) for n in shape) * max(1, dtype.itemsize) > min(size, member.file_size):
        raise ValueError(f"{member.filename} claims the shape {shape}, which its bytes do not hold")
