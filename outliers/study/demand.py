"""Memory that a study takes: on the machine, and on each GPU. The one place where that is decided, for plan and loading alike.

Arithmetic on a description of the model; no torch is loaded for it. Weights are counted whole, with all experts. Before
it: `model_info`, with `weights` and `work`. After it: `plan`, which refuses, and the loading, which places.
"""

from __future__ import annotations

from outliers.model.describe import ModelInfo
from outliers.spec import StudySpec
from outliers.study.placement import Placement, even, fit
from outliers.study.prepare import layout_of
from outliers.study.ring_size import MAX_WRITERS, ring_bytes, ring_slots, writers_bytes

PROCESS_BYTES = 1_000_000_000
"""For the process itself: a forward pass of a tiny Llama took 0.37 GB here (ru_maxrss, torch 2.13, transformers 5.17), kernels
that are made for each new shape of an expert's share another 0.1, and the rest is a margin that was chosen, not measured."""
GPU_PROCESS_BYTES = 4_000_000_000
"""The same where GPUs compute, with the libraries of CUDA in it. Chosen, not measured."""
HEAD_SLICES = 4
"""Slices of logits alive while perplexity is measured: in the dtype, divided or capped, in float32, its softmax."""
SLICE_BYTES = 64 * 1024 * 1024
"""`perplexity.SLICE_BYTES`, which can't be read without loading torch; a test holds them equal."""


def needs(spec: StudySpec, info: ModelInfo) -> dict[str, int]:
    """Bytes of memory that a study takes.

    ring_bytes: of the capture. activation_bytes: of one layer's forward pass. vram_bytes: of one GPU that holds the whole
    model. ram_bytes: of a machine that computes without a GPU. host_ram_bytes: of one that computes with GPUs.
    """
    weights = info.weights
    layer, activations = max(weights.layer_bytes), _activation_bytes(spec, info)
    ring = _ring_bytes(spec, info)
    layout = layout_of(spec, info)
    writers = writers_bytes(layout.largest_chunk_bytes, MAX_WRITERS, packed=layout.codec != "none")
    # while experts are merged from their files a layer is there twice; no pass runs then
    fleeting = max(layer, activations)
    # a GGUF file is dequantized to float32 before it is cast, on this machine
    gguf = info.total_parameters * 4 if info.source.kind == "gguf" else 0
    host = max(layer, weights.memory_bytes + gguf if gguf else 0)
    return {
        "ring_bytes": ring,
        "activation_bytes": activations,
        "vram_bytes": weights.memory_bytes + work_bytes(spec, info),
        "ram_bytes": weights.memory_bytes + gguf + fleeting + ring + writers + PROCESS_BYTES,
        # weights go to the GPUs tensor by tensor from memory-mapped files, whose pages the system can take back
        "host_ram_bytes": host + _ring_bytes(spec, info, pinned=True) + writers + GPU_PROCESS_BYTES,
    }


def work_bytes(spec: StudySpec, info: ModelInfo) -> int:
    """Bytes that each GPU needs beside the weights: one layer's pass and the tensors that wait for the ring, or, while
    the experts of a layer are merged, that layer once more."""
    return max(_activation_bytes(spec, info) + _ring_bytes(spec, info), max(info.weights.layer_bytes))


def placement_for(info: ModelInfo, spec: StudySpec, gpu_bytes: tuple[int | None, ...]) -> Placement:
    """Which GPU holds which part of the model, on as few GPUs as do; at most --gpu-count of them.

    gpu_bytes: total memory of each device as it was found, by its number; 0 where it is not told, None for one that must
    not be used (--gpu-filter). Raises PlanRefused with what is needed and what there is.
    """
    return fit(info.weights.parts, gpu_bytes, work_bytes(spec, info), spec.compute.gpu_count)


def even_placement(info: ModelInfo, spec: StudySpec) -> Placement:
    """The model on --gpu-count equal GPUs (one where that is left open), however large they have to be."""
    return even(info.weights.parts, spec.compute.gpu_count or 1, work_bytes(spec, info))


def _activation_bytes(spec: StudySpec, info: ModelInfo) -> int:
    """Bytes of one layer's forward pass over one batch, an upper bound (`work`), with the head's where it runs."""
    passing = info.weights.work.bytes(
        spec.capture.batch_sequences,
        spec.corpus.sequence_length,
        layout_of(spec, info).itemsize,
        eager=info.attention_implementation == "eager",
        padded=spec.corpus.packing == "documents",
    )
    return max(passing, HEAD_SLICES * SLICE_BYTES) if spec.capture.perplexity else passing


def _ring_bytes(spec: StudySpec, info: ModelInfo, *, pinned: bool = False) -> int:
    layout = layout_of(spec, info)
    slot = spec.capture.batch_sequences * layout.positions * max(layout.widths.values()) * layout.itemsize
    return ring_bytes(slot, ring_slots(slot), pinned=pinned)
