"""The stages of a capture for `benchmarks.capture`: each is one method that runs all sequences once and returns its seconds.

The pieces are those of a study (hooks, staging buffer, chunks, journal); the bare forward pass and the loop of the earlier
pipeline are written here.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outliers.capture.forward import Batch, HookedPass
from outliers.capture.staging import StagingBuffer
from outliers.capture.work import write_parts
from outliers.corpus.tokens import Corpus
from outliers.store.chunks import ChunkFiles, create_arrays
from outliers.store.journal import Journal
from outliers.study.layout import Layout
from outliers.study.prepare import Prepared, layout_of
from outliers.study.ring_size import ring_bytes, ring_slots, writer_count, writers_bytes

LAYERS_A_PASS = 8
"""Layers whose activations the earlier pipeline kept at a time."""


class NoBuffer:
    """Ignores each tensor: shows the cost of the hooks alone."""

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Nothing."""


class Bench:
    """A study's model and corpus, and one method a variant; a method runs all sequences once."""

    def __init__(self, study: Prepared, corpus: Corpus, model: torch.nn.Module, scratch: Path) -> None:
        self.study, self.corpus, self.model, self.scratch = study, corpus, model, scratch
        self.base = model.get_submodule(study.model.anatomy.backbone)
        self.layout = layout_of(study.spec, study.model)
        self.modules = study.model.anatomy.modules(tuple(self.layout.stored), self.layout.layers)
        self.ids = torch.from_numpy(corpus.token_ids.astype(np.int64))
        self.slot_bytes = self.layout.positions * max(self.layout.widths.values()) * self.layout.itemsize

    @property
    def bytes(self) -> int:
        """Of activations in one run."""
        return self.layout.activation_bytes

    def run(self, variant: str) -> float:
        """Seconds of one run of a variant."""
        return {
            "a": self.bare,
            "b": self.hooks,
            "c": self.copies,
            "d": self.zarr,
            "e": self.packed,
            "f": self.earlier,
        }[variant](self.calm())

    def calm(self) -> Path:
        """An empty folder, once the disk has all that was written and the pages of it are given back."""
        os.sync()
        for path in self.scratch.rglob("*"):
            if path.is_file() and hasattr(os, "posix_fadvise"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def bare(self, folder: Path) -> float:
        """(a)"""
        began = time.perf_counter()
        with torch.inference_mode():
            for row in self.ids:
                self.base(input_ids=row[None], use_cache=False)
        return time.perf_counter() - began

    def hooks(self, folder: Path) -> float:
        """(b)"""
        return self._pass(NoBuffer(), self.layout, folder)

    def copies(self, folder: Path) -> float:
        """(c)"""
        with self._ring(lambda key, values: None) as ring:
            return self._pass(ring, self.layout, folder)

    def zarr(self, folder: Path) -> float:
        """(d)"""
        return self._capture(folder, "none")

    def packed(self, folder: Path) -> float:
        """(e)"""
        return self._capture(folder, "zstd")

    def earlier(self, folder: Path) -> float:
        """(f)"""
        began = time.perf_counter()
        for number, row in enumerate(self.ids):
            for start in range(0, len(self.layout.layers), LAYERS_A_PASS):
                kept: dict[str, torch.Tensor] = {}
                handles = []
                for module in self.modules:
                    if start <= module.layer < start + LAYERS_A_PASS:
                        name = f"{number}_layer{module.layer}_{module.site}"
                        target = self.base.get_submodule(module.path)
                        handles.append(target.register_forward_hook(_keep(kept, name)))
                with torch.no_grad():
                    self.model(input_ids=row[None], use_cache=False)
                for handle in handles:
                    handle.remove()
                for name, tensor in kept.items():
                    torch.save(tensor, folder / f"{name}.pt")
        return time.perf_counter() - began

    def _capture(self, folder: Path, codec: str) -> float:
        layout = Layout(**(self.layout.__dict__ | {"codec": codec}))
        create_arrays(folder, layout, self.corpus.token_ids, self.corpus.lengths)
        began = time.perf_counter()
        with self._ring(write_parts) as ring:
            self._pass(ring, layout, folder)
        return time.perf_counter() - began

    def bound(self, codec: str) -> int:
        """Bytes beside the model that a capture prints as its bound."""
        writers = writer_count(os.cpu_count() or 1)
        beside = writers_bytes(self.layout.largest_chunk_bytes, writers, packed=codec != "none")
        return ring_bytes(self.slot_bytes, ring_slots(self.slot_bytes)) + beside

    def _ring(self, write: Callable[[Any, Any], None]) -> StagingBuffer:
        return StagingBuffer(self.slot_bytes, ring_slots(self.slot_bytes), write)

    def _pass(self, ring: Any, layout: Layout, folder: Path) -> float:
        # `ring` may be a replacement that writes nothing: then no journal and no files are used
        hooked = HookedPass(self.base, self.modules, ring, layout, lambda done: None)
        journal, files = Journal(folder / "journal.jsonl"), ChunkFiles(folder, layout)
        began = time.perf_counter()
        for number, row in enumerate(self.ids):
            batch = Batch(range(number, number + 1), (layout.positions,), len(self.modules), journal, files)
            hooked.forward(batch, row[None])
        seconds = time.perf_counter() - began
        hooked.detach()
        return seconds

    def write(self, way: str, tensors: dict[tuple[str, int], np.ndarray]) -> float:
        """Seconds to put `tensors` on disk for every sequence, in one way of WRITES."""
        folder = self.calm()
        if way == "raw":
            return self._write_raw(folder / "raw", tensors)
        if way == "zarr":
            return self._write_zarr(folder, tensors)
        if way == "ring":
            return self._write_ring(folder, tensors)
        return self._write_chunks(folder, "zstd" if way == "zstd" else "none", tensors)

    def _write_raw(self, path: Path, tensors: dict[tuple[str, int], np.ndarray]) -> float:
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(len(self.ids)):
                for values in tensors.values():
                    file.write(values.data.cast("B"))
            os.fsync(file.fileno())
        return time.perf_counter() - began

    def _write_chunks(self, folder: Path, codec: str, tensors: dict[tuple[str, int], np.ndarray]) -> float:
        """By as many threads as a staging buffer has, from the memory of the tensors."""
        layout = Layout(**(self.layout.__dict__ | {"codec": codec}))
        create_arrays(folder, layout, self.corpus.token_ids, self.corpus.lengths)
        journal, files = Journal(folder / "journal.jsonl"), ChunkFiles(folder, layout)
        began = time.perf_counter()
        with ThreadPoolExecutor(writer_count(os.cpu_count() or 1)) as pool:
            for number in range(len(self.ids)):
                batch = Batch(range(number, number + 1), (layout.positions,), len(self.modules), journal, files)
                for (site, layer), values in tensors.items():
                    pool.submit(write_parts, (batch, site, layer), values[None])
        seconds = time.perf_counter() - began
        if len(journal.done) != len(self.ids):
            raise RuntimeError("not every sequence was written")
        return seconds

    def _write_ring(self, folder: Path, tensors: dict[tuple[str, int], np.ndarray]) -> float:
        create_arrays(folder, self.layout, self.corpus.token_ids, self.corpus.lengths)
        journal, files = Journal(folder / "journal.jsonl"), ChunkFiles(folder, self.layout)
        sources = {key: torch.from_numpy(values)[None].view(torch.uint16) for key, values in tensors.items()}
        began = time.perf_counter()
        with self._ring(write_parts) as ring:
            for number in range(len(self.ids)):
                batch = Batch(range(number, number + 1), (self.layout.positions,), len(self.modules), journal, files)
                for (site, layer), tensor in sources.items():
                    ring.submit((batch, site, layer), tensor)
        return time.perf_counter() - began

    def _write_zarr(self, folder: Path, tensors: dict[tuple[str, int], np.ndarray]) -> float:
        import zarr

        create_arrays(folder, self.layout, self.corpus.token_ids, self.corpus.lengths)
        group = zarr.open_group(folder / "activations.zarr", mode="r+")
        arrays = {site: group[site] for site in self.layout.stored}
        began = time.perf_counter()
        for number in range(len(self.ids)):
            for (site, layer), values in tensors.items():
                arrays[site][layer, number] = values
        return time.perf_counter() - began

    def one_pass(self) -> dict[tuple[str, int], np.ndarray]:
        """Real activations of the first sequence, (position, feature) uint16, to write again and again."""
        kept: dict[tuple[str, int], np.ndarray] = {}

        class Keep:
            def submit(self, key: Any, tensor: torch.Tensor) -> None:
                kept[key[1], key[2]] = tensor[0].contiguous().view(torch.uint16).numpy().copy()

        # Keep takes the place of the buffer, and nothing is written: this batch has no journal and no files
        hooked = HookedPass(self.base, self.modules, Keep(), self.layout, lambda done: None)  # type: ignore[arg-type]
        batch = Batch(range(1), (self.layout.positions,), len(self.modules), None, None)  # type: ignore[arg-type]
        hooked.forward(batch, self.ids[:1])
        hooked.detach()
        return kept


def _keep(kept: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
        kept[name] = output.detach().cpu().clone()

    return hook
