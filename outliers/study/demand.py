"""What a study takes of a machine, computed once: the shapes of its capture, memory, and how the model lies on GPUs.

`demand_of` is the one place where that is decided, for planning and for loading. It is arithmetic on a description of the
model and loads no torch. Weights count whole, with all experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pydantic import ValidationError

from outliers.errors import PlanRefused
from outliers.hardware import Gpu, is_named_like
from outliers.model.describe import ModelInfo
from outliers.spec import StudySpec
from outliers.study.counting_memory import counting_bytes
from outliers.study.layout import Layout
from outliers.study.parts import longest_shard
from outliers.study.pass_memory import device_pass_bytes, host_pass_bytes
from outliers.study.placement import Placement, even, fit
from outliers.study.prepare import layout_of
from outliers.study.probe_memory import ProbeMemory, probe_memory
from outliers.study.processes import check_asked, check_memory, fitting, groups
from outliers.study.ring_size import MAX_WRITERS, ring_bytes, ring_slots, writers_bytes
from outliers.study.window import held_bytes
from outliers.untrusted.bounds import RECEIVED_BYTES

PROCESS_BYTES = 1_000_000_000
"""For the process itself: a forward pass of a tiny Llama took 0.37 GB here (ru_maxrss, torch 2.13, transformers 5.17), and the
rest is a margin that was chosen, not measured."""
PRODUCT_BYTES = 850_000
"""Code and memory that torch keeps on a CPU for a product of 16-bit matrices with a number of rows that is new: 0.61 to 0.82 MB,
measured with torch 2.13 on a processor with AMX for weights of 64 x 32 to 1,536 x 2,048. In float32 it keeps nothing."""
KEPT_PRODUCTS = 1024
"""How many of them it keeps. Experts get other numbers of rows in each pass: a tiny mixture of 4 experts in bfloat16 grew from
0.28 GB to 1.14 GB in 2.4 million tokens, and no further than that."""
GPU_PROCESS_BYTES = 4_000_000_000
"""The same where GPUs compute, with the libraries of CUDA in it. Chosen, not measured."""
HEAD_SLICES = 4
"""Slices of logits alive while perplexity is measured: in the dtype, divided or capped, in float32, its softmax."""
SLICE_BYTES = 64 * 1024 * 1024
"""`perplexity.SLICE_BYTES`, which can't be read without loading torch; a test holds them equal."""


@dataclass(frozen=True)
class Demand:
    """What a study takes of a machine. Made by `demand_of`; all amounts are in bytes.

    A study that is split over several machines takes each amount of memory on each of them.
    """

    spec: StudySpec
    model: ModelInfo
    layout: Layout
    """Of the whole capture."""
    parts: tuple[int, ...]
    """Weights of the embedding, each decoder layer, and the rest, in the order of the forward pass; by layers the
    largest layer stands for all."""
    ring_bytes: int
    """The staging buffers between the forward pass and the writers."""
    activation_bytes: int
    """One layer's forward pass over one batch, an upper bound, with the head's where it runs."""
    work_bytes: int
    """On each GPU in addition to its weights: one layer's pass and the tensors that wait for the ring, or, while the experts
    of a layer are merged, that layer once more."""
    vram_bytes: int
    """A GPU that holds the whole model."""
    ram_bytes: int
    """Main memory where no GPU computes."""
    host_ram_bytes: int
    """Main memory where GPUs compute."""
    experts_bytes: int
    """Of main memory, what reading the experts takes: their sums, and one layer's values of one batch. 0 where none are read."""
    counting_bytes: int
    """Of main memory, what counting the experts takes after the pass, when no model is there. 0 where none are read."""
    private_bytes: int
    """The statistics of each column and expert, which stay on the machine: what `outliers export --full` brings home."""
    host_pass_bytes: int = 0
    """Of main memory where no GPU computes, what counting in the pass takes; a part of `ram_bytes`."""
    device_pass_bytes: int = 0
    """The same of each GPU; a part of `work_bytes`."""

    @property
    def layered(self) -> bool:
        """Whether the model is read a layer at a time."""
        return self.spec.compute.schedule == "layers"

    @property
    def spool_bytes(self) -> int:
        """Disk of hidden states between two layers, and of the experts' table until the end; 0 for a whole pass."""
        if not self.layered:
            return 0
        layout = self.layout
        return (
            2 * layout.num_sequences * layout.positions * self.model.hidden_size * layout.itemsize + layout.table_bytes
        )

    @property
    def summary_bytes(self) -> int:
        """What a machine may send as a private summary: its totals, and as much as any other folder for the sparse counts."""
        return self.private_bytes + RECEIVED_BYTES

    @cached_property
    def shard_layout(self) -> Layout:
        """Shapes of the longest shard's part of the capture. BadInput where there are more shards than batches."""
        return layout_of(longest_shard(self.spec), self.model) if self.spec.compute.shards > 1 else self.layout

    @property
    def held_bytes(self) -> int:
        """The most that a machine has of the capture on its disk at once: with rolling its first sequences and two windows, as
        large as asked, or of one batch each where that is left open."""
        return self.held_with(0)

    def held_with(self, free_bytes: int) -> int:
        """The same where so much is free on the disk, which decides a window that is left open."""
        compute = self.spec.compute
        part = longest_shard(self.spec) if compute.shards > 1 else self.spec
        processes = compute.shards if compute.runs_here else 1
        return min(self.layout.total_bytes, processes * held_bytes(part, self.shard_layout, free_bytes))

    @property
    def rolling_bytes(self) -> int | None:
        """What --store rolling would have on the disk at once; None where the study is not one for it, or keeps all."""
        spec = self.spec.model_dump()
        spec["capture"]["store"] = "rolling"
        try:
            rolling = replace(self, spec=StudySpec.model_validate(spec))
        except ValidationError:
            return None
        return rolling.held_bytes if rolling.held_bytes < self.held_bytes else None

    @property
    def shares_machine(self) -> bool:
        """Whether several processes of the study run on this computer together."""
        return self.spec.compute.runs_here and self.spec.compute.shards > 1

    @property
    def gpus_each(self) -> int | None:
        """How many GPUs a process may use, None for all it finds. Processes that share this computer have one each."""
        asked = self.spec.compute.gpu_count
        return 1 if self.shares_machine and asked != 0 else asked

    @property
    def most_processes(self) -> int:
        """How many processes of one machine have a batch to read each; one where windows or layers are read one by one."""
        if self.layered or self.spec.capture.store != "full":
            return 1
        corpus, capture = self.spec.corpus, self.spec.capture
        return max(1, -(-corpus.num_sequences // capture.batch_sequences) // self.spec.compute.shards)

    def memory_bytes(self, *, gpus: bool) -> int:
        """Main memory of one process, that computes with or without GPUs."""
        return self.host_ram_bytes if gpus else self.ram_bytes

    def uses_gpus(self, gpus: Sequence[Gpu]) -> bool:
        """Whether the study computes on a machine's GPUs."""
        return bool(gpus) and self.spec.compute.gpu_count != 0

    def place(self, gpus: Sequence[Gpu], most: int | None) -> Placement:
        """Which GPU holds which part of the model: as few GPUs as hold it, at most `most`, of those that --gpu-filter allows.

        A GPU whose `total_bytes` is 0 (its driver doesn't tell) is taken to be large enough. Raises PlanRefused with what
        is needed and what there is.
        """
        wanted = self.spec.compute.gpu_filter
        totals = tuple(gpu.total_bytes if is_named_like(gpu.name, wanted) else None for gpu in gpus)
        return fit(self.parts, totals, self.work_bytes, 1 if self.layered else most)

    def place_all(self, gpus: Sequence[Gpu], most: int | None, free_ram_bytes: int) -> tuple[Placement, ...]:
        """Where each process of a machine with GPUs has the model, the first one as `place` says.

        As many processes as --processes says, else as many as GPUs of the same kind, main memory and batches allow. Raises
        PlanRefused where the GPUs don't hold the model, or not so many processes.
        """
        asked = self.spec.compute.processes
        found = [self.place(gpus, most)]
        if asked == 1 or self.shares_machine:
            return tuple(found)
        wanted = self.spec.compute.gpu_filter
        names = [gpu.name if is_named_like(gpu.name, wanted) else "" for gpu in gpus]
        size = len(found[0].gpus)
        for group in groups(found[0].gpus, names, most)[1:]:
            with contextlib.suppress(PlanRefused):  # of the same name, and with less memory
                found.append(self._place_alike(found[0], group, gpus))
        if asked is not None:
            check_asked(asked, len(found), size, len(gpus))
            check_memory(asked, self.host_ram_bytes, free_ram_bytes)
            return tuple(found[:asked])
        return tuple(found[: fitting(min(len(found), self.most_processes), self.host_ram_bytes, free_ram_bytes)])

    def _place_alike(self, first: Placement, group: tuple[int, ...], gpus: Sequence[Gpu]) -> Placement:
        """The model on other GPUs as on those of `first`; cut anew where their memory is another. Raises PlanRefused."""
        alike = dict(zip(first.gpus, group, strict=True))
        if all(gpus[there].total_bytes == gpus[here].total_bytes for here, there in alike.items()):
            return first.model_copy(update={"devices": tuple(alike[gpu] for gpu in first.devices)})
        totals = tuple(gpu.total_bytes if number in group else None for number, gpu in enumerate(gpus))
        return fit(self.parts, totals, self.work_bytes, len(group))

    def place_evenly(self) -> Placement:
        """The model on --gpu-count equal GPUs (one where that is left open), however large they have to be."""
        return even(self.parts, 1 if self.layered else self.gpus_each or 1, self.work_bytes)


def demand_of(spec: StudySpec, info: ModelInfo) -> Demand:
    """What a study of this model takes of a machine."""
    layout, weights = layout_of(spec, info), info.weights
    slot = spec.capture.batch_sequences * layout.positions * max(layout.widths.values()) * layout.itemsize
    ring = ring_bytes(slot, ring_slots(slot))
    pinned = ring_bytes(slot, ring_slots(slot), pinned=True)
    writers = writers_bytes(layout.largest_chunk_bytes, MAX_WRITERS, packed=layout.codec != "none")
    activations, layer = _activation_bytes(spec, info, layout.itemsize), max(weights.layer_bytes)
    # a GGUF file is dequantized to float32 before it is cast, on this machine
    # a probe loads the model again after the capture: of both, the larger one counts
    probe = probe_memory(spec, info, layout, activations) if spec.probe.asked else ProbeMemory(0, 0)
    in_pass = spec.capture.store == "none"
    on_device, on_host = (device_pass_bytes(spec, layout), host_pass_bytes(spec, layout)) if in_pass else (0, 0)
    layered = spec.compute.schedule == "layers"
    parts = (weights.embedding_bytes, layer, weights.rest_bytes) if layered else weights.parts
    work = max(activations + ring + on_device, layer, probe.work)
    wider = max(1, probe.model // max(1, weights.memory_bytes))  # a probe in float32 of a model of 2 bytes a value
    gguf = info.total_parameters * 4 if info.source.kind == "gguf" else 0
    # weights go to the GPUs tensor by tensor from memory-mapped files, whose pages the system can take back
    host = max(wider * layer, weights.memory_bytes + gguf if gguf else 0)
    experts, counting, private = _experts_bytes(spec, layout), _counting_bytes(layout), _private_bytes(spec, layout)
    # with --store rolling or none the process that captures counts as well
    beside = writers + experts + (counting_bytes(spec, layout) + counting if spec.capture.store != "full" else 0)
    process = PROCESS_BYTES + _products_bytes(spec, info, layout)
    counted = PROCESS_BYTES + private + counting if counting else 0  # and the totals of the columns
    return Demand(
        spec=spec,
        model=info,
        layout=layout,
        parts=tuple(part * wider for part in parts),
        ring_bytes=ring,
        activation_bytes=activations,
        work_bytes=work,
        vram_bytes=wider * sum(parts) + work,
        # while experts are merged from their files a layer is there twice; no pass runs then
        ram_bytes=max(
            sum(parts) + gguf + max(layer, activations) + ring + beside + on_host + process,
            probe.model + gguf + probe.work + process,
            counted,
        ),
        host_ram_bytes=max(host + pinned + beside + GPU_PROCESS_BYTES, counted),
        experts_bytes=experts,
        counting_bytes=counting,
        private_bytes=private,
        host_pass_bytes=on_host,
        device_pass_bytes=on_device,
    )


def _experts_bytes(spec: StudySpec, layout: Layout) -> int:
    """Memory that reading the experts takes in the pass: their sums, the table of a batch, and the inputs and outputs of the
    experts of one layer, which are there twice while they are put in order."""
    experts = layout.experts
    if experts is None:
        return 0
    tokens = spec.capture.batch_sequences * layout.positions
    table = tokens * experts.token_bytes
    if not experts.values:
        return table
    rows = tokens * (experts.slots * (experts.width + experts.hidden) + sum(experts.shared_widths) + experts.hidden)
    return experts.sums_bytes + table + 2 * rows * layout.itemsize


def _products_bytes(spec: StudySpec, info: ModelInfo, layout: Layout) -> int:
    """Memory that torch keeps on a CPU for the products of experts, two for each number of rows that one of them may get."""
    if not info.num_experts or layout.itemsize > 2 or info.experts_implementation == "batched_mm":
        return 0
    rows = spec.capture.batch_sequences * layout.positions
    return min(KEPT_PRODUCTS, 2 * rows) * PRODUCT_BYTES


def _counting_bytes(layout: Layout) -> int:
    """Memory for counting the experts after the pass; one process may count all sequences of a capture."""
    if layout.experts is None:
        return 0
    return layout.experts.counting_bytes(layout.num_sequences, layout.positions, inputs="mlp_in" in layout.widths)


def _private_bytes(spec: StudySpec, layout: Layout) -> int:
    """An upper bound of the totals of a private summary; the counts of single sequences, which are sparse, come on top."""
    magnitudes, layers = len(spec.criteria.magnitudes), len(layout.layers)
    # of each layer and feature: hits of all tokens and of first ones, extremes, four moments, how many were finite
    columns = sum(layout.widths.values()) * layers * (16 * magnitudes + 8 + 32 + 8)
    experts = layout.experts
    if experts is None:
        return columns
    inputs = 8 * len(experts.layers) * experts.experts * experts.hidden if "mlp_in" in layout.widths else 0
    counted = 4 * layout.num_sequences * len(experts.layers) * experts.all_experts
    return columns + experts.sums_bytes + counted + (inputs if experts.values else 0)


def _activation_bytes(spec: StudySpec, info: ModelInfo, itemsize: int) -> int:
    passing = info.weights.work.bytes(
        spec.capture.batch_sequences,
        spec.corpus.sequence_length,
        itemsize,
        eager=info.attention_implementation == "eager",
        padded=spec.corpus.packing == "documents",
    )
    return max(passing, HEAD_SLICES * SLICE_BYTES) if spec.capture.perplexity else passing
