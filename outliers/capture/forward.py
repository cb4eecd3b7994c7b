"""One forward pass: hooks that see each site of each layer exactly once, and a batch that is journaled when it is written.

Knows modules and tensors. `model.families` names the modules, `staging` takes the tensors, and `extract` runs the passes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from outliers.errors import SiteError
from outliers.events.stream import Reporter
from outliers.model.anatomy import SiteModule
from outliers.store.chunks import ChunkFiles, Journal
from outliers.store.durable import Unsynced
from outliers.study.layout import Layout

PROGRESS_SECONDS = 0.5


@dataclass
class Batch:
    """One forward pass, and its results in any order; `finish` journals them when all have come.

    lengths: tokens of each sequence that are not padding. expected: results to come, one for each (site, layer, sequence), one
    more if perplexity is measured, and one more if experts are read.
    """

    sequences: range
    lengths: tuple[int, ...]
    expected: int
    journal: Journal
    files: ChunkFiles
    written: dict[tuple[str, int, int], list[tuple[int, int]]] = field(default_factory=dict)
    losses: dict[int, dict[str, Any]] = field(default_factory=dict)
    _parts: int = 0
    _unsynced: Unsynced | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def unsynced(self) -> Unsynced:
        """Files of the batch that may not be on the disk yet; the first caller makes it, before the first file is written."""
        with self._lock:
            if self._unsynced is None:
                self._unsynced = Unsynced(self.files.root)
            return self._unsynced

    @property
    def positions(self) -> int:
        """Positions of the pass: those of its longest sequence."""
        return max(self.lengths)

    def add(self, site: str, layer: int, sequence: int, chunks: list[tuple[int, int]]) -> bool:
        """Note the (crc32, bytes) of the chunks of one layer of one sequence; returns whether it was the last result."""
        with self._lock:
            self.written[site, layer, sequence] = chunks
            return self._one_more()

    def add_losses(self, losses: dict[int, dict[str, Any]]) -> bool:
        """Note the perplexity of each sequence's journal line; returns whether it was the last result."""
        with self._lock:
            self.losses = losses
            return self._one_more()

    def add_table(self, written: dict[tuple[str, int, int], list[tuple[int, int]]]) -> bool:
        """Note the (crc32, bytes) of the routing table of each sequence; returns whether it was the last result."""
        with self._lock:
            self.written |= written
            return self._one_more()

    def _one_more(self) -> bool:
        self._parts += 1
        return self._parts == self.expected

    def finish(self) -> None:
        """Make the chunks and their names durable, then journal the sequences."""
        self.unsynced().sync()
        entries = []
        for sequence in self.sequences:
            entry: dict[str, Any] = {"sequence": sequence, "crc32": {}, "sizes": {}, "bytes": 0}
            for site in self.files.layout.stored:
                chunks = [
                    c for layer in range(len(self.files.layout.layers)) for c in self.written[site, layer, sequence]
                ]
                entry["crc32"][site] = [crc for crc, _ in chunks]
                entry["sizes"][site] = [size for _, size in chunks]
                entry["bytes"] += sum(size for _, size in chunks)
            for name in self.files.layout.fields:
                crc, size = self.written[name, 0, sequence][0]
                entry["crc32"][name], entry["sizes"][name] = [crc], [size]
                entry["bytes"] += size
            entries.append(entry | self.losses.get(sequence, {}))
        self.journal.append(entries)


class Sink(Protocol):
    """Takes the tensors of a pass: the staging buffer, or what counts them where they are (`counting.in_pass`)."""

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Take one tensor. key: (batch, site, index of the layer among the captured ones). It may change afterwards."""


class HookedPass:
    """The hooks of a model and the batch they fill: each (site, layer) exactly once in a forward pass.

    `on_layer` is called after each tensor with the share of the batch that has passed, in sequences.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        modules: list[SiteModule],
        staging: Sink,
        layout: Layout,
        on_layer: Callable[[float], None],
    ) -> None:
        self.base, self.staging, self.layout, self.on_layer = base, staging, layout, on_layer
        self.batch: Batch | None = None
        self.seen: set[tuple[str, int]] = set()
        self.expected = {(m.site, m.layer) for m in modules}
        self._index = {layer: number for number, layer in enumerate(layout.layers)}
        self._reading = False
        self._handles = [self._attach(module) for module in modules]

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _attach(self, module: SiteModule) -> RemovableHandle:
        try:
            target = self.base.get_submodule(module.path)
        except AttributeError as error:
            raise SiteError(f"the model has no module {module.path} for the site {module.site}") from error
        if module.side == "output":
            return target.register_forward_hook(lambda _m, _args, out, at=module: self._take(at, out))
        return target.register_forward_pre_hook(
            lambda _m, args, kwargs, at=module: self._take(at, _received(at, args, kwargs)), with_kwargs=True
        )

    def _take(self, at: SiteModule, value: Any) -> None:
        if not self._reading:
            return
        tensor = value[0] if isinstance(value, tuple) else value
        if self.batch is None:
            raise SiteError(f"{at.path} ran outside of a batch")
        if (at.site, at.layer) in self.seen:
            raise SiteError(f"{at.path} ran twice in one forward pass: the site {at.site} must have one tensor a layer")
        self.seen.add((at.site, at.layer))
        self.staging.submit((self.batch, at.site, self._index[at.layer]), self._checked(at, tensor, self.batch))
        self.on_layer(len(self.batch.sequences) * len(self.seen) / len(self.expected))

    def _checked(self, at: SiteModule, tensor: Any, batch: Batch) -> torch.Tensor:
        """The tensor as (sequence, position, feature). Raises SiteError if its shape or dtype is not that of the site."""
        rows, width = len(batch.sequences), self.layout.widths[at.site]
        wanted = (rows, batch.positions, width)
        if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == (rows * batch.positions, width):
            tensor = tensor.reshape(wanted)  # some modules get the tokens of all sequences as one row
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != wanted:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise SiteError(f"{at.path} gave {found}, the site {at.site} needs {wanted}")
        if str(tensor.dtype) != f"torch.{self.layout.dtype}":
            raise SiteError(
                f"{at.path} gave {tensor.dtype}, this capture is of {self.layout.dtype}: choose another --dtype"
            )
        return tensor

    def forward(self, batch: Batch, ids: torch.Tensor, *, read: bool = True) -> torch.Tensor:
        """Run the base model on one batch and, if `read`, check that every site was seen.

        ids: (sequence, position) int64, as long as the longest sequence of the batch. Returns the last hidden state,
        (sequence, position, hidden), after the final norm. Raises SiteError.
        """
        self.batch, self.seen, self._reading = batch, set(), read
        options = pass_options(ids, batch.lengths)
        try:
            with torch.inference_mode():
                output = self.base(input_ids=ids, **options)
        finally:
            self._reading = False
        missing = sorted(self.expected - self.seen) if read else []
        if missing:
            site, layer = missing[0]
            raise SiteError(
                f"{len(missing)} of {len(self.expected)} tensors never came, first: {site} of layer {layer}"
            )
        hidden: torch.Tensor = output[0]
        return hidden


def pass_options(ids: torch.Tensor, lengths: tuple[int, ...]) -> dict[str, Any]:
    """What the base model is given with its ids: a mask where a sequence has padding, and no cache.

    ids: (sequence, position). A pass with other options has other last bits, so every pass of a study takes these.
    """
    options: dict[str, Any] = {"use_cache": False}
    if min(lengths) < ids.shape[1]:
        own = torch.tensor(lengths, device=ids.device)
        columns = torch.arange(ids.shape[1], device=ids.device)
        options["attention_mask"] = (columns < own[:, None]).long()  # (sequence, position)
    return options


def _received(at: SiteModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a module: its first argument, or the one that attention modules take by name."""
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    raise SiteError(f"{at.path} was given {', '.join(kwargs) or 'nothing'}, and no hidden_states: read another module")


class Progress:
    """Reports the tokens read so far, at most every PROGRESS_SECONDS; a layer counts as its share of its sequence."""

    def __init__(self, reporter: Reporter, todo: int, asked: int, tokens: int) -> None:
        """todo: sequences to read, of `asked` sequences, which have `tokens` tokens."""
        self.reporter, self.todo, self.asked, self.tokens = reporter, todo, asked, tokens
        self.done = 0.0
        self._reported = 0.0

    def during(self, sequences: float) -> None:
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self._report(self.done + sequences)

    def finished(self, sequences: int) -> None:
        self.done += sequences
        if self.done >= self.todo:
            self._report(self.done)
        else:
            self.during(0)

    def _report(self, sequences: float) -> None:
        self._reported = time.monotonic()
        # each sequence counts as an average one: that is exact enough for a progress bar
        done = min(self.tokens, int((self.asked - self.todo + sequences) * self.tokens / self.asked))
        self.reporter.progress("extract", done, self.tokens, "tokens")
