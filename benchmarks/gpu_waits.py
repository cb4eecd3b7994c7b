"""How often a forward pass waits for the GPU, and whether the hooks of a capture add to that: a part of `gpu_capture`.

torch's debug mode warns of each call that waits, as far as it knows them. transformers' experts wait twice a layer where one
kernel does not multiply all experts (`estimate.launches_of_experts`). Without a GPU nothing waits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_costs import Bench


def measure(bench: Bench) -> dict[str, Any]:
    """Waits of one bare pass, and of one whose hooks copy every tensor; None without a GPU."""
    if bench.devices[0].type != "cuda":
        return {"bare": None, "captured": None, "layers": bench.info.num_layers}
    bench.ids, all_ids = bench.ids[:1], bench.ids
    try:
        found = {name: _waits(getattr(bench, method)) for name, method in (("bare", "bare"), ("captured", "copy"))}
    finally:
        bench.ids = all_ids
    return {**found, "layers": bench.info.num_layers}


def _waits(run: Callable[[], float]) -> int:
    """Warnings of torch's debug mode while `run` runs. Its first and last synchronisation are not among them."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(one.message).lower() for one in said)
