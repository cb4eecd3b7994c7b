"""Tensors of safetensors files, read when they are sliced, by plain reads: pages of a mapped file would stay in memory.

Knows headers and bytes, nothing of models.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from outliers.errors import UnknownModel
from outliers.hub.headers import Tensor

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""dtype in a header -> torch's name; F8_E8M0 is in torch from 2.7 on."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, with what transformers' loader asks of safetensors' slices; `[...]` reads it."""

    name: str
    tensor: Tensor

    def get_dtype(self) -> str:
        return self.tensor.dtype

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, _: object) -> torch.Tensor:
        """The whole tensor, in memory of its own. Raises UnknownModel."""
        dtype = getattr(torch, _DTYPES.get(self.tensor.dtype, ""), None)
        if dtype is None:
            raise UnknownModel(
                f"{self.name} is stored in {self.tensor.dtype}, which torch {torch.__version__} can't read"
            )
        content = torch.empty(self.tensor.nbytes, dtype=torch.uint8)
        _fill(self.tensor.file, self.tensor.offset, content.numpy().data)
        return content.view(dtype).reshape(self.tensor.shape)


def _fill(path: Path, offset: int, target: memoryview) -> None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while target:
                count = os.preadv(file, [target], offset)
                if not count:
                    raise UnknownModel(f"{path} is cut off at byte {offset:,}: fetch or copy it again")
                target, offset = target[count:], offset + count
        finally:
            os.close(file)
    except OSError as error:
        raise UnknownModel(f"{path} can't be read: {error.strerror}") from error


READ_AHEAD_BYTES = 8_000_000


def read_ahead(tensors: list[Tensor]) -> None:
    """Read tensors once and forget them, so that the system has them in its cache; errors are for the reader to find."""
    buffer = memoryview(bytearray(READ_AHEAD_BYTES))
    for path, spans in _spans(tensors).items():
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            for begin, end in spans:
                while begin < end:
                    count = os.preadv(file, [buffer[: end - begin]], begin)
                    if not count:
                        break
                    begin += count
        except OSError:
            continue
        finally:
            os.close(file)


def _spans(tensors: list[Tensor]) -> dict[Path, list[tuple[int, int]]]:
    found: dict[Path, list[tuple[int, int]]] = {}
    for tensor in sorted(tensors, key=lambda tensor: (tensor.file, tensor.offset)):
        found.setdefault(tensor.file, []).append((tensor.offset, tensor.offset + tensor.nbytes))
    return found
