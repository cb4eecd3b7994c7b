"""The memory that a probe takes, from shapes: what planning counts, and what the probe keeps to. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from outliers.model.describe import ModelInfo
from outliers.spec import StudySpec
from outliers.study.layout import STORAGE, Layout

SLICE_BYTES = 32 * 1024 * 1024
"""Bytes of float64 logits at once. Chosen, not tuned."""
HEAD_SLICES = 7
"""Slices alive at once, each in float64: logits and probabilities of the untouched pass; those of a change, their exponential,
difference and product, and its logits in the dtype and in float32."""
MOST_GROUP = 8
"""Changes that share the untouched pass's log-probabilities."""
GROUP_BYTES = 1 << 28
"""Most bytes of the last hidden states of such a group, where more than one fits. Chosen, not tuned."""
MOST_KEPT_BYTES = 1 << 30
"""Most bytes of layers' outputs that are kept of one batch, so that changes behind them leave the layers out. Chosen."""
EDIT_FLOATS = 6
"""float32 copies of a site's tensor while it is quantized: the values, rotated, scaled, rounded, and their scales."""
WEIGHT_COPIES = 3
"""Copies of a layer's weights while they are quantized: the original, the changed ones, and float32 of what is changed now."""


@dataclass(frozen=True)
class ProbeMemory:
    """What a probe takes where the model computes, in bytes. model: its weights, in the probe's dtype. work: in addition."""

    model: int
    work: int


def slice_tokens(vocabulary: int) -> int:
    """Tokens of one slice of logits."""
    return max(1, SLICE_BYTES // (8 * vocabulary))


def group_size(hidden_bytes: int) -> int:
    """How many changes are measured together; hidden_bytes: what the last hidden states of one take."""
    return max(1, min(MOST_GROUP, GROUP_BYTES // max(1, hidden_bytes)))


def probe_memory(spec: StudySpec, info: ModelInfo, layout: Layout, activation_bytes: int) -> ProbeMemory:
    """The memory of a study's probe: weights, one layer's pass, slices of two heads, a group's hidden states, kept outputs.

    info: the model as the study has it; a probe in float32 loads it again, wider. layout: of the capture. activation_bytes: one
    layer's forward pass over one batch, in the study's dtype.
    """
    asked, own = spec.probe, STORAGE[info.dtype].itemsize
    itemsize = 4 if asked.probe_dtype == "float32" else own
    tokens = spec.capture.batch_sequences * layout.positions
    hidden = tokens * info.hidden_size * itemsize
    widest = max(layout.widths.values())
    silences = info.num_experts is not None and (asked.experts or asked.probe == "check")
    kept = min(MOST_KEPT_BYTES, info.num_layers * hidden) if asked.map or asked.weight or silences else 0
    layer = max(info.weights.layer_bytes) * itemsize // own
    work = (
        activation_bytes * itemsize // own
        + HEAD_SLICES * slice_tokens(info.vocab_size) * info.vocab_size * 8
        + (1 + group_size(hidden)) * hidden
        + kept
        + EDIT_FLOATS * tokens * widest * 4
        + (WEIGHT_COPIES * layer if asked.weights else 0)
    )
    return ProbeMemory(model=info.weights.memory_bytes * itemsize // own, work=work)
