"""What a captured pass costs on a GPU, and whether what arrives is what the model computed: a part of `gpu_capture`.

Variants, side by side: each round runs all of them over the same random tokens, one sequence a batch.

    bare    the base model, no hooks
    hooks   every site is seen and checked, nothing is copied
    copy    + side stream, pinned slots, events; the writers throw the values away
    full    + chunks, checksums, fsync, journal: what `outliers study` does

The check is a captured pass in which the model's own stream copies each tensor too, right after the hook. What Zarr
then reads from disk must be bit for bit what those copies hold: a copy that began too early, memory that the allocator
gave away, a slot that was reused too soon, a model that overwrites its tensor in place, all show as a difference. It
is done with the ring's own size and with two slots. Before it, one pass starts a copy in every hook while torch makes calls that
wait for the GPU an error, as far as its debug mode sees them.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zarr

from benchmarks.gpu_rings import NeverWaiting, NoBuffer, Witness
from outliers.capture.extract import write_parts
from outliers.capture.forward import Batch, HookedPass
from outliers.capture.staging import StagingBuffer
from outliers.model.describe import ModelInfo
from outliers.spec import StudySpec
from outliers.store.chunks import ChunkFiles, create_arrays
from outliers.store.journal import Journal
from outliers.study.prepare import layout_of
from outliers.study.ring_size import ring_slots

VARIANTS = {
    "bare": "bare forward",
    "hooks": "hooks only",
    "copy": "hooks + copy",
    "full": "full capture to disk",
}
FEW_SLOTS = 2


class Bench:
    """A model on its devices, and one method a variant; a method runs all sequences once and returns seconds."""

    def __init__(
        self, spec: StudySpec, info: ModelInfo, model: torch.nn.Module, devices: list[torch.device], scratch: Path
    ) -> None:
        self.info, self.devices, self.scratch = info, devices, scratch
        self.layout = layout_of(spec, info)
        self.base = model.get_submodule(info.anatomy.backbone)
        self.modules = info.anatomy.modules(tuple(self.layout.stored), self.layout.layers)
        self.slot_bytes = self.layout.positions * max(self.layout.widths.values()) * self.layout.itemsize
        self.slots = ring_slots(self.slot_bytes)
        shape = (self.layout.num_sequences, self.layout.positions)
        self.tokens = np.random.default_rng(0).integers(0, info.vocab_size, shape, dtype=np.int32)
        self.ids = torch.from_numpy(self.tokens.astype(np.int64)).to(devices[0])
        self.ring_bytes = 0
        self.waited_seconds = 0.0

    def bare(self) -> float:
        """The model alone."""
        began = self._now()
        with torch.inference_mode():
            for row in self.ids:
                self.base(input_ids=row[None], use_cache=False)
        return self._now() - began

    def hooks(self) -> float:
        """Hooks that do nothing with what they see."""
        began = self._now()
        self._pass(NoBuffer(), None)
        return self._now() - began

    def copy(self) -> float:
        """Into the ring and no further."""
        began = self._now()
        with self._ring(lambda key, values: None) as ring:
            self._pass(ring, None)
        return self._now() - began

    def full(self) -> float:
        """To disk, until the last sequence is journaled."""
        with self._folder() as folder:
            began = self._now()
            with self._ring(write_parts) as ring:
                self._pass(ring, folder)
            self.waited_seconds = ring.waited_seconds
            return self._now() - began

    def never_wait(self) -> None:
        """One sequence; raises RuntimeError where a hook waits for a GPU."""
        probe = NeverWaiting(self.slot_bytes, self.devices[0])
        try:
            self._pass(probe, None, sequences=1)
        finally:
            probe.copies.close()

    def differences(self, slots: int) -> int:
        """Tensors of one captured sequence that are not on disk bit for bit as the model had them."""
        with self._folder() as folder:
            with self._ring(write_parts, slots) as ring:
                witness = Witness(ring)
                self._pass(witness, folder, sequences=1)
            stored: Any = zarr.open_group(folder / "activations.zarr", mode="r")
            wrong = 0
            for (site, layer), kept in witness.kept.items():
                found = np.ascontiguousarray(stored[site][layer, :1])
                wrong += found.tobytes() != kept.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            return wrong

    def _ring(self, write: Callable[[Any, Any], None], slots: int | None = None) -> StagingBuffer:
        ring = StagingBuffer(self.slot_bytes, slots or self.slots, write, pinned=self.devices[0].type == "cuda")
        self.ring_bytes = ring.total_bytes
        return ring

    def _pass(self, ring: Any, folder: Path | None, sequences: int | None = None) -> None:
        place = folder if folder is not None else self.scratch
        journal, files = Journal(place / "journal.jsonl"), ChunkFiles(place, self.layout)
        hooked = HookedPass(self.base, self.modules, ring, self.layout, lambda done: None)
        try:
            for number, row in enumerate(self.ids[:sequences]):
                run, lengths = range(number, number + 1), (self.layout.positions,)
                hooked.forward(Batch(run, lengths, len(self.modules), journal, files), row[None])
        finally:
            hooked.detach()

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        lengths = np.full(self.layout.num_sequences, self.layout.positions, np.int32)
        try:
            create_arrays(folder, self.layout, self.tokens, lengths)
            yield folder
        finally:
            shutil.rmtree(folder)

    def _now(self) -> float:
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()


def measure(bench: Bench, rounds: int, until: float) -> dict[str, Any]:
    """Seconds (medians), ratios to the bare forward (medians of the rounds' own), peaks of memory, and the check.

    until: on the monotonic clock; after the first round, no other begins later.
    """
    bench.bare()  # warm: first touches of the weights, choice of kernels
    bench.never_wait()
    different = {slots: bench.differences(slots) for slots in dict.fromkeys((bench.slots, FEW_SLOTS))}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks: dict[str, list[int]] = {name: [0] * len(bench.devices) for name in VARIANTS}
    pinned: int | None = 0
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            before = _reset_peaks(bench.devices)
            seconds[name].append(getattr(bench, name)())
            peaks[name] = [max(pair) for pair in zip(peaks[name], _vram_peaks(bench.devices), strict=True)]
            after = _pinned_bytes(bench.devices, "peak")
            pinned = None if pinned is None or before is None or after is None else max(pinned, after - before)
    ratios = {
        name: statistics.median(s / b for s, b in zip(times, seconds["bare"], strict=True))
        for name, times in seconds.items()
    }
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = bench.tokens.size
    held = max(copy - hooks for copy, hooks in zip(peaks["copy"], peaks["hooks"], strict=True))
    return {
        "devices": [_name(device) for device in bench.devices],
        "tensors": len(bench.modules),
        "rounds": len(seconds["bare"]),
        "tokens": tokens,
        "activation_bytes": bench.layout.activation_bytes,
        "seconds": medians,
        "ratio_to_bare": ratios,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "bytes_per_second": {name: bench.layout.activation_bytes / medians[name] for name in ("copy", "full")},
        "waited_seconds": bench.waited_seconds,
        "slots": bench.slots,
        "ring_bytes": bench.ring_bytes,
        "pinned_peak_bytes": pinned,
        "vram_peak_bytes": peaks,
        "vram_held_by_copies_bytes": held,
        "rss_bytes": psutil.Process().memory_info().rss,
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "different_tensors": {str(slots): count for slots, count in different.items()},
        "equal": not any(different.values()),
        "within_bound": pinned is None or pinned <= bench.ring_bytes,
    }


def _reset_peaks(devices: list[torch.device]) -> int | None:
    """Begin to watch for peaks; returns the pinned memory that is in use before anything runs."""
    if devices[0].type != "cuda":
        return 0
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
        torch.cuda.reset_peak_host_memory_stats()
    return _pinned_bytes(devices, "current")


def _vram_peaks(devices: list[torch.device]) -> list[int]:
    """Most bytes in use on each device: with those that were freed and wait for a side stream."""
    if devices[0].type != "cuda":
        return [0] * len(devices)
    return [int(torch.cuda.memory_stats(device)["active_bytes.all.peak"]) for device in devices]


def _pinned_bytes(devices: list[torch.device], which: str) -> int | None:
    """Pinned memory in use, `current` or `peak`; None where this torch doesn't count it, 0 without a GPU."""
    if devices[0].type != "cuda":
        return 0
    if not hasattr(torch.cuda, "host_memory_stats"):
        return None
    found = torch.cuda.host_memory_stats().get(f"active_bytes.{which}")
    return None if found is None else int(found)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def show(found: dict[str, Any]) -> None:
    """The figures of one placement as a table."""
    mega = 1e6
    print(f"\n{' + '.join(found['devices'])}: {found['tokens']} tokens, {found['tensors']} tensors a pass")
    print(f"{'':24}{'seconds':>10}{'of bare':>10}{'tokens/s':>12}{'peak VRAM, MB':>24}")
    for name, title in VARIANTS.items():
        vram = " + ".join(f"{peak / mega:.0f}" for peak in found["vram_peak_bytes"][name])
        print(
            f"{title:24}{found['seconds'][name]:10.4f}{found['ratio_to_bare'][name]:10.3f}"
            f"{found['tokens_per_second'][name]:12.0f}{vram:>24}"
        )
    rates = ", ".join(f"{name} {rate / mega:.0f} MB/s" for name, rate in found["bytes_per_second"].items())
    print(f"activations {found['activation_bytes'] / mega:.0f} MB a run: {rates}")
    print(f"in the last full run the hooks waited {found['waited_seconds']:.3f} s for a free slot")
    pinned = (
        "unknown to this torch" if found["pinned_peak_bytes"] is None else f"{found['pinned_peak_bytes'] / mega:.0f} MB"
    )
    print(
        f"ring: {found['slots']} slots, {found['ring_bytes'] / mega:.0f} MB said; pinned at most {pinned}: "
        f"{'within it' if found['within_bound'] else 'BEYOND IT'}; "
        f"device memory that copies held {found['vram_held_by_copies_bytes'] / mega:.0f} MB"
    )
    print(f"process: {found['rss_bytes'] / mega:.0f} MB now, {found['max_rss_bytes'] / mega:.0f} MB at most")
    for slots, count in found["different_tensors"].items():
        print(f"check with {slots} slots: {'every tensor equal' if not count else f'{count} TENSORS DIFFER'}")
