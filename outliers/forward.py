"""One forward pass: hooks that see each site of each layer exactly once, and the batch that is journaled when all is written.

Knows modules and tensors, and hands on; what is done with a tensor is the ring's and the store's business. Before it:
`architectures`, which names the modules. After it: `ring`. `capture` drives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from outliers.architectures import SiteModule
from outliers.errors import SiteError
from outliers.events import Reporter
from outliers.ring import Ring
from outliers.store import ChunkFiles, Journal, Layout

PROGRESS_SECONDS = 0.5


@dataclass
class Batch:
    """Chunks of one batch as they come from the writers, in any order; `finish` journals it when all are there."""

    sequences: range
    expected: int
    journal: Journal
    files: ChunkFiles
    written: dict[tuple[str, int, int], list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, site: str, layer: int, sequence: int, chunks: list[tuple[int, int]]) -> bool:
        """Note the chunks of one layer of one sequence; True when they are the last."""
        self.written[site, layer, sequence] = chunks
        return len(self.written) == self.expected

    def finish(self) -> None:
        self.files.sync()
        entries = []
        for sequence in self.sequences:
            entry: dict[str, Any] = {"sequence": sequence, "crc32": {}, "sizes": {}, "bytes": 0}
            for site in self.files.layout.widths:
                chunks = [
                    c for layer in range(len(self.files.layout.layers)) for c in self.written[site, layer, sequence]
                ]
                entry["crc32"][site] = [crc for crc, _ in chunks]
                entry["sizes"][site] = [size for _, size in chunks]
                entry["bytes"] += sum(size for _, size in chunks)
            entries.append(entry)
        self.journal.append(entries)


class HookedPass:
    """The hooks of a model and the batch they feed: each (site, layer) exactly once a forward pass.

    `on_layer` is told, after each tensor, how many sequences' worth of the batch have passed.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        modules: list[SiteModule],
        ring: Ring,
        layout: Layout,
        on_layer: Callable[[float], None],
    ) -> None:
        self.ring, self.layout, self.on_layer = ring, layout, on_layer
        self.batch: Batch | None = None
        self.seen: set[tuple[str, int]] = set()
        self.expected = {(m.site, m.layer) for m in modules}
        self._index = {layer: number for number, layer in enumerate(layout.layers)}
        for module in modules:
            self._attach(base, module)

    def _attach(self, base: torch.nn.Module, module: SiteModule) -> None:
        try:
            target = base.get_submodule(module.path)
        except AttributeError as error:
            raise SiteError(f"the model has no module {module.path} for the site {module.site}") from error
        if module.side == "output":
            target.register_forward_hook(lambda _m, _args, out, at=module: self._take(at, out))
        else:
            target.register_forward_pre_hook(lambda _m, args, at=module: self._take(at, args))

    def _take(self, at: SiteModule, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        if self.batch is None:
            raise SiteError(f"{at.path} ran outside of a batch")
        if (at.site, at.layer) in self.seen:
            raise SiteError(f"{at.path} ran twice in one forward pass: the site {at.site} must have one tensor a layer")
        wanted = (len(self.batch.sequences), self.layout.positions, self.layout.widths[at.site])
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != wanted:
            raise SiteError(
                f"{at.path} gave {getattr(tensor, 'shape', type(tensor))}, the site {at.site} needs {wanted}"
            )
        if str(tensor.dtype) != f"torch.{self.layout.dtype}":
            raise SiteError(
                f"{at.path} gave {tensor.dtype}, this capture is of {self.layout.dtype}: choose another --dtype"
            )
        self.seen.add((at.site, at.layer))
        self.ring.submit((self.batch, at.site, self._index[at.layer]), tensor)
        self.on_layer(len(self.batch.sequences) * len(self.seen) / len(self.expected))

    def forward(self, base: torch.nn.Module, batch: Batch, ids: torch.Tensor) -> None:
        """Run the base model on ids (sequence, position) int64 and check that every site was seen."""
        self.batch, self.seen = batch, set()
        with torch.inference_mode():
            base(input_ids=ids, use_cache=False)
        missing = sorted(self.expected - self.seen)
        if missing:
            site, layer = missing[0]
            raise SiteError(
                f"{len(missing)} of {len(self.expected)} tensors never came, first: {site} of layer {layer}"
            )


class Progress:
    """Tokens read so far, told at most every PROGRESS_SECONDS; a layer counts its share of its sequence."""

    def __init__(self, reporter: Reporter, layout: Layout, todo: int) -> None:
        self.reporter, self.layout, self.todo = reporter, layout, todo
        self.before = layout.num_sequences - todo
        self.done = 0.0
        self._told = 0.0

    def during(self, sequences: float) -> None:
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._tell(self.done + sequences)

    def finished(self, sequences: int) -> None:
        self.done += sequences
        if self.done >= self.todo:
            self._tell(self.done)
        else:
            self.during(0)

    def _tell(self, sequences: float) -> None:
        self._told = time.monotonic()
        total = self.layout.num_sequences * self.layout.positions
        self.reporter.progress("extract", int((self.before + sequences) * self.layout.positions), total, "tokens")
