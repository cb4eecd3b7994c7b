"""The hidden states between two layers on disk: what the next layer is given, with shape, dtype and checksum.

<capture>/layers/hidden-<layer>-<batch>.bin    what that layer gets; removed once the layer is journaled
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from outliers.capture.by_layers.record import changed
from outliers.store.durable import Unsynced, write_soon

Described = dict[str, Any]
"""shape, dtype and crc32 of a spooled tensor, for the line that names it."""


class Spool:
    """Tensors of whole batches, each written once and read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, layer: int, batch: int, hidden: torch.Tensor, unsynced: Unsynced) -> Described:
        """Write what a layer is given; durable after `unsynced.sync()`. Raises as `write_soon`."""
        values = hidden.detach().to("cpu").contiguous()
        content = values.reshape(-1).view(torch.uint8).numpy().data
        write_soon(str(self._path(layer, batch)), content, unsynced)
        return {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "crc32": crc32(content),
        }

    def read(self, layer: int, batch: int, described: Described, device: str) -> torch.Tensor:
        """What a layer is given, on a device. Raises CorruptCapture where it is not what was written."""
        path = self._path(layer, batch)
        # in memory of torch's own, aligned as any result is: some kernels choose by alignment
        values = torch.empty(described["shape"], dtype=getattr(torch, described["dtype"]))
        content = values.reshape(-1).view(torch.uint8).numpy().data
        try:
            with path.open("rb", buffering=0) as file:
                whole = _fill(file, content) and not file.read(1)
        except OSError as error:
            raise changed(path) from error
        if not whole or crc32(content) != described["crc32"]:
            raise changed(path)
        return values.to(device)

    def drop(self, layer: int) -> None:
        """Remove what a layer and those before it were given."""
        for path in self._folder.glob("hidden-*.bin"):
            if int(path.name.split("-")[1]) <= layer:
                path.unlink()

    def _path(self, layer: int, batch: int) -> Path:
        return self._folder / f"hidden-{layer}-{batch}.bin"


def _fill(file: Any, content: memoryview) -> bool:
    while content:
        count = file.readinto(content)
        if not count:
            return False
        content = content[count:]
    return True
