"""What a study can't have where the capture does not keep all activations, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outliers.spec import StudySpec


def check_store(spec: StudySpec) -> None:
    """ValueError for what needs activations that a store does not keep."""
    store = f"--store {spec.capture.store}"
    if spec.formats.formats:
        raise ValueError(
            f"--formats samples tokens of the whole corpus, and {store} keeps the first sequences alone: leave one of them "
            "out"
        )
    if spec.compute.executor.startswith("dask="):
        raise ValueError(
            f"--executor {spec.compute.executor} counts a capture that is there whole, and {store} counts windows of it on "
            "the machine that captures: leave one of them out"
        )
    probed, kept = min(spec.probe.probe_sequences, spec.corpus.num_sequences), spec.capture.store_sequences
    if spec.probe.asked and probed > kept:
        raise ValueError(
            f"a probe of {probed} sequences is compared with the capture of them, and {store} keeps the first {kept}: give "
            f"--store-sequences {probed}, or --probe-sequences {kept}"
        )
