"""What of a capture is on the disk at once: all of it, or with --store rolling its first sequences and two windows.

Integer arithmetic on a layout, before and while a capture runs. Knows no file.
"""

from __future__ import annotations

from outliers.spec import StudySpec
from outliers.study.layout import Layout

GB = 10**9
FREE_SHARE = 10
"""The default window is one part in FREE_SHARE of what is free. Two windows and the growing summary leave the rest to others."""
WINDOWS = 2
"""One is counted while the next is captured."""


def kept_sequences(spec: StudySpec) -> int:
    """Sequences at the beginning of the corpus that stay on the disk: all, or with rolling whole batches of them."""
    return spec.corpus.num_sequences if spec.capture.store == "full" else rolling_keeps(spec)


def rolling_keeps(spec: StudySpec) -> int:
    """Sequences that rolling keeps of a study, whether it is asked for or not."""
    capture, total = spec.capture, spec.corpus.num_sequences
    return min(total, -(-capture.store_sequences // capture.batch_sequences) * capture.batch_sequences)


def freed_bytes(layout: Layout) -> int:
    """Bytes of the chunks of one sequence, which rolling frees: activations and the routing table of experts, uncompressed."""
    return (layout.activation_bytes + layout.table_bytes) // layout.num_sequences


def window_sequences(spec: StudySpec, layout: Layout, free_bytes: int) -> int:
    """Sequences in a window of rolling: whole batches, at least one. free_bytes: on the workspace's disk."""
    asked, compute = spec.capture.disk_window, spec.compute
    # shards that are processes of this computer share its disk
    share = FREE_SHARE * (compute.shards if compute.runs_here else 1)
    size = int(asked * GB) if asked is not None else free_bytes // share
    batch = spec.capture.batch_sequences
    return max(1, size // (freed_bytes(layout) * batch)) * batch


def held_bytes(spec: StudySpec, layout: Layout, free_bytes: int = 0) -> int:
    """The most that a capture has on the disk at once, the sums of experts apart.

    free_bytes: what is free on the disk, which decides the default window; 0: the smallest window, which is one batch.
    """
    if spec.capture.store == "full":
        return layout.total_bytes
    freed = WINDOWS * window_sequences(spec, layout, free_bytes) if spec.capture.store == "rolling" else 0
    there = kept_sequences(spec) + freed
    return min(layout.total_bytes, layout.side_bytes + there * freed_bytes(layout))
