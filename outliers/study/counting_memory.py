"""Memory of counting a capture, in bytes, before it exists: one set of totals, and what is kept of spans that are read at once.

Arithmetic on a layout; SmolLM2's counting took 0.24 GB in all with the process, 48 layers of 2,048 features 0.38
(docs/performance.md).
"""

from __future__ import annotations

import os

from outliers.spec import StudySpec
from outliers.study.layout import Layout

KEY_BYTES = 8
"""Bytes for a token's feature while the layers of its span are read, and for each counter."""
COUNTERS = 8
"""Arrays (layer, feature) kept for each site in addition to its hits: extremes, moments, finite values."""
PATTERNS = 1 << 16
"""Bins of a layer's histogram."""
FINE_BYTES = 9 * PATTERNS * 16
"""Of a layer's float32 values at resid, those that are counted by their bits while windows are freed
(`counting.second_look.ROLLING_BINS`): 9 bins of 65,536 values, 16 bytes each."""


def counting_bytes(spec: StudySpec, layout: Layout) -> int:
    """An upper bound, the process apart."""
    layers, widths = len(layout.layers), sum(layout.widths.values()) + max(layout.widths.values())  # and the block's
    cells = layers * widths * (2 * len(spec.criteria.magnitudes) + COUNTERS)
    histograms = layers * len(layout.widths) * PATTERNS
    spans = 2 * (os.cpu_count() or 1) * widths * layout.chunk_positions
    fine = layers * FINE_BYTES if layout.dtype == "float32" and "resid" in layout.widths else 0
    return KEY_BYTES * (cells + histograms + spans) + (fine if spec.capture.store == "rolling" else 0)
