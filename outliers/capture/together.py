"""A capture that several processes read: which GPUs and which batches each has, and what they did together.

A process has a span of the sequences, whole batches of it. The spans depend on the number of processes alone, so that sums of
experts are added in the same order after a kill. `processes` starts them and talks to them; `worker` is what they run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from outliers.capture.channel import Share
from outliers.capture.devices import Devices
from outliers.capture.experts import ExpertSumsFile
from outliers.capture.processes import Team
from outliers.events.stream import Reporter
from outliers.experts.sums_files import sums_path
from outliers.hardware import cuda_names
from outliers.store.journal import Journal
from outliers.study.parts import spans
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

log = logging.getLogger(__name__)


def processes_of(prepared: Prepared, devices: Devices) -> int:
    """How many processes read a capture on this machine: --processes where the processor computes, else as they were placed."""
    return prepared.spec.compute.processes or 1 if devices.placement is None else 1 + len(devices.others)


def environments(devices: Devices, processes: int, gpus_here: int) -> tuple[dict[str, str], ...]:
    """The variables of each process: the GPUs that it sees. gpus_here: how many this process sees."""
    if devices.placement is None:
        return ({},) * processes
    names = cuda_names(gpus_here)
    placed = (devices.placement, *devices.others)[:processes]
    return tuple({"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] for gpu in one.gpus)} for one in placed)


def prepared_for_each(prepared: Prepared, devices: Devices) -> Prepared:
    """The study as each process reads it: one process, on the GPUs that it sees."""
    changes: dict[str, Any] = {"processes": 1}
    if devices.placement is not None:
        changes["gpu_count"] = len(devices.placement.gpus)
    compute = prepared.spec.compute.model_copy(update=changes)
    return prepared.model_copy(update={"spec": prepared.spec.model_copy(update={"compute": compute})})


@dataclass(frozen=True)
class Together:
    """One call of `extract` that several processes do; the caller holds the capture and has begun it.

    batches: those that are left, each with whether its activations are read. experts: which values are in sums already, None
    where none are read.
    """

    prepared: Prepared
    workspace: Workspace
    devices: Devices
    reporter: Reporter
    journal: Journal
    experts: ExpertSumsFile | None
    batches: Sequence[tuple[range, bool]]

    def run(self, chosen: range, processes: int, tokens: int, already: int) -> dict[str, Any]:
        """Read the batches; what was done, as `extract` returns it.

        chosen: the sequences that the call is for. tokens: of all of them, of which `already` were read before. Raises the error
        of the first process that fails; PlanRefused where no process has its GPUs free, or fewer than --processes.
        """
        began = time.monotonic()
        seen = torch.cuda.device_count() if self.devices.placement is not None else 0
        each = prepared_for_each(self.prepared, self.devices)
        with Team(each, self.workspace, environments(self.devices, processes, seen), self.reporter) as team:
            count = team.gather(all_of_them=self.prepared.spec.compute.processes is not None)
            shares = self.shares(chosen, count)
            readers = sum(share is not None for share in shares)
            log.info("%d processes read %d sequences", readers, sum(len(run) for run, _ in self.batches))
            results = team.read(shares, self.journal, tokens, already)
        return summed(results, time.monotonic() - began)

    def shares(self, chosen: range, count: int) -> list[Share | None]:
        """What each of `count` processes reads: the batches that are left of its span; None where none is left."""
        size = self.prepared.spec.capture.batch_sequences
        used = min(count, -(-len(chosen) // size))
        found: list[Share | None] = [None] * count
        for number, (first, stop) in enumerate(spans(len(chosen), size, used)):
            span = range(chosen.start + first, chosen.start + stop)
            own = [(run, read) for run, read in self.batches if run.start in span]
            if own:
                found[number] = self._share(span, own)
        return found

    def _share(self, span: range, own: Sequence[tuple[range, bool]]) -> Share:
        experts, folder = self.experts, self.workspace.capture(self.prepared.capture_id)
        held = [s for run, _ in own for s in run if experts is not None and experts.holds(s)]
        return Share(
            span=(span.start, span.stop),
            batches=tuple((run.start, run.stop, read) for run, read in own),
            goes_on=experts is not None and sums_path(folder, span) in experts.files,
            held=tuple(held),
        )


def summed(results: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """What processes did that ran side by side for `seconds`, as one result."""
    tokens = sum(one["tokens"] for one in results)
    passing = max(one["seconds"] - one["load_seconds"] - one["download_seconds"] for one in results)
    return {
        **results[0],
        **{name: sum(one[name] for one in results) for name in ("sequences", "bytes", "gpus", "ring_bytes")},
        **{name: max(one[name] for one in results) for name in ("load_seconds", "ring_waited_seconds")},
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(passing, 1e-9), 1),
        "process": os.getpid(),
        "processes": len(results),
    }
