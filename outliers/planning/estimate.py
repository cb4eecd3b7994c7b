"""How long each step of a study takes on an offer, and what that costs. Each number comes with its assumption.

Nothing is loaded. Only the speed of this computer's processor is measured. A step of unknown speed has no number, and the
total says that it is without that step. Rates that were not measured here are called assumed.
"""

from __future__ import annotations

import math
import re
import time
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from outliers.hardware import Facts, capability_of
from outliers.machines.base import Offer
from outliers.model.describe import ModelInfo
from outliers.spec import DEFAULT_PROVIDER
from outliers.study.demand import Demand
from outliers.study.layout import Layout
from outliers.study.probes import count_passes
from outliers.study.schedule import READ_BYTES_PER_SECOND
from outliers.units import format_gb, format_mb_per_second, format_price, format_seconds

OWN = (DEFAULT_PROVIDER, "ssh")
"""Providers of machines that run already: nothing boots."""

BOOT_SECONDS = 300.0
"""From asking a cloud for a machine to a shell on it. Assumed: clouds say one to ten minutes."""
DEPLOY_SECONDS = 120.0
"""An environment with torch and its CUDA libraries, some 3.5 GB of wheels, where there is none yet. Assumed."""
HERE_BYTES_PER_SECOND = 50e6
"""From the hub to this machine: an office's or a home's line. Assumed."""
THERE_BYTES_PER_SECOND = 200e6
"""From the hub to another machine: a data centre's line. Assumed."""
UPLOAD_BYTES_PER_SECOND = 10e6
"""From here to another machine. Assumed."""
DISK_BYTES_PER_SECOND = READ_BYTES_PER_SECOND
"""Reading weights and writing the capture. Assumed: an SSD on its own writes three times that (docs/performance.md), a
cloud's network disk a half."""
DISK_RATE = format_mb_per_second(DISK_BYTES_PER_SECOND)
IMPORT_SECONDS = 8.0
"""torch and transformers, as here."""

GPU_EFFICIENCY = 0.3
"""Of a GPU's dense peak. Assumed, and low: batches are one sequence, and nothing was measured on a GPU."""
PASS_EFFICIENCY = 0.5
"""SmolLM2's captured pass reached 874 tokens/s here, 235 GFLOP/s, where the product of matrices reached 448."""
CORE_FLOPS = 20e9
"""A core of another machine without GPU. Assumed: one with bfloat16 in hardware reached 118 GFLOP/s here."""
MEASURE_SIZE = 768

ANALYSIS_CORE_SECONDS_PER_GB = 1.0
"""One thread took 0.5 to 0.7 s a gigabyte, 2.2 where 1% of all values are hits (docs/performance.md)."""
FORMAT_BYTES_PER_CORE_SECOND = 0.5e9
"""The slowest way, a rotated 4-bit format of bfloat16 values; others take a third of it (docs/performance.md)."""
FORMAT_TRIES = 4
"""Variants of a format at most: as it is, with held features, rotated, rotated with held features."""
PROBE_FACTOR = 1.7
"""A changed pass and its head over a bare pass: 1.1 for int8, 1.69 for NVFP4 (docs/performance.md)."""
LAUNCH_SECONDS = 10e-6
"""From Python to a kernel on a GPU, for one of many small products. Assumed, and not measured on one."""
GROUPED_FROM = (9, 0)
"""Compute capability from which one kernel multiplies all experts of a layer (torch's grouped_mm); before it, and in eager code,
each expert is multiplied alone, twice, and the device is waited for twice a layer: 12,288 launches a pass of Qwen3-30B-A3B. Read
in transformers 5.17, not measured on a GPU."""
COMPILE_SECONDS = 10.0
"""numba's kernels, once on a machine (docs/performance.md)."""


class Card(NamedTuple):
    """Dense TFLOP/s in each dtype, and GB/s of its memory. `words`: all of them are in the GPU's name."""

    words: tuple[str, ...]
    bfloat16: float
    float16: float
    float32: float
    memory: float


CARDS = (
    # Assumed, after the makers' data sheets and not checked against them again: half of what NVIDIA's print "with sparsity";
    # of the RTX cards with sums in float32, as in its white papers; of the A10G as Amazon gives it. float32: without
    # TF32, which torch leaves off. V100 and T4 have no bfloat16 and compute it in float32. The first that fits counts;
    # of several variants with one name, the slower memory.
    Card(("b200",), 2250, 2250, 75, 7700),
    Card(("gh200",), 989, 989, 67, 4000),
    Card(("h200",), 989, 989, 67, 4800),
    Card(("h100", "pcie"), 756, 756, 51, 2000),
    Card(("h100", "nvl"), 835, 835, 60, 3900),
    Card(("h100",), 989, 989, 67, 3350),
    Card(("a100", "80gb"), 312, 312, 19.5, 1935),
    Card(("a100",), 312, 312, 19.5, 1555),
    Card(("l40s",), 362, 362, 91.6, 864),
    Card(("l40",), 181, 181, 90.5, 864),
    Card(("l4",), 121, 121, 30.3, 300),
    Card(("a10g",), 70, 70, 31.5, 600),
    Card(("a10",), 125, 125, 31.2, 600),
    Card(("a40",), 149.7, 149.7, 37.4, 696),
    Card(("v100", "pcie"), 14, 112, 14, 900),
    Card(("v100",), 15.7, 125, 15.7, 900),
    Card(("t4",), 8.1, 65, 8.1, 300),
    Card(("5090",), 209.5, 209.5, 104.8, 1792),
    Card(("4090",), 165.2, 165.2, 82.6, 1008),
    Card(("3090",), 71, 71, 35.6, 936),
    Card(("6000", "ada"), 364, 364, 91.1, 960),
    Card(("a6000",), 154.8, 154.8, 38.7, 768),
)
LESS = {"laptop", "mobile", "max", "mig"}
"""Words in a name that mean a slower card than the one of that name."""


class Step(BaseModel):
    """One step of a study; `seconds` is None where no number can be given, and `assumption` says why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seconds: float | None
    assumption: str


def estimate(
    demand: Demand, offer: Offer, gpus: tuple[str, ...], left: int, download: int, processes: int = 1
) -> tuple[Step, ...]:
    """The steps of a study on an offer, in order, without those that are not needed.

    gpus: names of those that hold the model of one process, empty where the processor computes. processes: how many read side
    by side on the machine. left: bytes of the capture still to write
    on that machine. download: bytes of the weights that are not on this machine; another machine is assumed to have none.
    Of a study that is spread (--shards) over machines these are the steps of the longest part, and on this machine those of
    all its processes, which share it.
    """
    info, compute = demand.model, demand.spec.compute
    here, shards = offer.provider == DEFAULT_PROVIDER, compute.shards
    layout = demand.layout if here else demand.shard_layout
    steps = _arrive(offer)
    if left:
        steps += _fetch(info, offer.provider, download, shards)
        size = sum(demand.parts[::2]) if demand.layered else info.weights.checkpoint_bytes
        loading = shards if here and shards > 1 else processes
        steps += [_load(size, loading, offer.facts.cpus), _pass(demand, layout, offer, gpus, left, processes)]
    steps.append(_analysis(compute.executor, layout.total_bytes, offer.facts))
    steps += _formats(demand, offer.facts)
    return (*steps, *_probe(demand, offer, gpus))


def total_seconds(steps: tuple[Step, ...]) -> float:
    """Of all steps that have a number."""
    return round(sum(step.seconds or 0 for step in steps), 1)


def left_out(steps: tuple[Step, ...]) -> tuple[str, ...]:
    """Names of the steps that the total leaves out."""
    return tuple(step.name for step in steps if step.seconds is None)


def price_of(steps: tuple[Step, ...], price_per_hour: float, machines: int = 1) -> float:
    """Dollars for `machines` machines while the steps last, from their boot on."""
    return round(machines * total_seconds(steps) * price_per_hour / 3600, 4)


def over_budget(steps: tuple[Step, ...], price_per_hour: float, most: float | None, machines: int = 1) -> str | None:
    """Why an offer costs more than `most` dollars in all, with both numbers; None where it does not, as far as is known."""
    price = price_of(steps, price_per_hour, machines)
    if most is None or price <= most:
        return None
    digits = next((n for n in range(2, 4) if f"{price:.{n}f}" != f"{most:.{n}f}"), 4)
    without = left_out(steps)
    much = f"more than ${price:.{digits}f}" if without else f"about ${price:.{digits}f}"
    lasts = format_seconds(total_seconds(steps)) + (f", not counting {' and '.join(without)}" if without else "")
    return (
        f"the study would cost {much} in all ({lasts}, {format_price(price_per_hour, machines)}), and at most "
        f"${most:.{digits}f} is allowed (--max-total-price)"
    )


def find_card(name: str) -> Card | None:
    """The row of CARDS for a GPU as a driver or a catalog spells it; None for one that is not there."""
    words = {re.sub(r"^(rtx|tesla)(?=.)", "", word) for word in re.findall(r"[a-z0-9]+", name.lower())}
    if words & LESS:
        return None
    return next((card for card in CARDS if words.issuperset(card.words)), None)


def _arrive(offer: Offer) -> list[Step]:
    steps = []
    if offer.provider not in OWN:
        steps.append(Step(name="boot", seconds=BOOT_SECONDS, assumption="assumed, until a rented machine has a shell"))
    if offer.provider != DEFAULT_PROVIDER:
        text = "assumed, for torch and all else where there is none yet; seconds where there is"
        steps.append(Step(name="deploy", seconds=DEPLOY_SECONDS, assumption=text))
    return steps


def _fetch(info: ModelInfo, provider: str, download: int, machines: int) -> list[Step]:
    """How the weights come to the machine; to several, those from here share this machine's line."""
    if info.source.kind == "hub":
        size = download if provider == DEFAULT_PROVIDER else info.weights.checkpoint_bytes
        rate = HERE_BYTES_PER_SECOND if provider == DEFAULT_PROVIDER else THERE_BYTES_PER_SECOND
        return [_moved("download", size, f"{format_gb(size)} from the hub", rate)] if size else []
    if provider == DEFAULT_PROVIDER:
        return []
    size = info.weights.checkpoint_bytes
    what = f"at most {format_gb(size)} of weights from this machine" + (
        f" to each of {machines}" if machines > 1 else ""
    )
    return [_moved("upload", size * machines, what, UPLOAD_BYTES_PER_SECOND)]


def _moved(name: str, size: int, what: str, rate: float) -> Step:
    return Step(name=name, seconds=round(size / rate, 1), assumption=f"{what} at {format_mb_per_second(rate)}, assumed")


def _load(size: int, processes: int, cpus: int) -> Step:
    imports = IMPORT_SECONDS * max(1.0, processes / max(1, cpus))
    each = f", for {processes} processes on {cpus} cores" if processes > 1 else ""
    return Step(
        name="load",
        seconds=round(size / DISK_BYTES_PER_SECOND + imports, 1),
        assumption=f"{format_gb(size)} of weights at {DISK_RATE}, assumed, and {imports:g} s of imports{each}",
    )


def _pass(demand: Demand, layout: Layout, offer: Offer, gpus: tuple[str, ...], left: int, processes: int) -> Step:
    """The slowest of computing, reading the weights, and writing the capture: they go on side by side."""
    info, sequences = demand.model, -(-layout.num_sequences * left // layout.total_bytes)
    if gpus and offer.provider == DEFAULT_PROVIDER:
        # each shard takes one GPU; with more shards than GPUs they run one after the other
        shards = demand.spec.compute.shards
        sequences = -(-sequences // shards) * -(-shards // len(offer.facts.gpus))
    batch = demand.spec.capture.batch_sequences
    if gpus and processes > 1:
        # the longest share, in whole batches; on one processor they share its cores
        sequences = min(sequences, -(-math.ceil(sequences / batch) // processes) * batch)
    tokens, batches = sequences * layout.positions, -(-sequences // batch)
    each = flops_per_token(info, layout.positions)
    share = f"{processes} processes side by side, " if gpus and processes > 1 else ""
    flops, work = tokens * each, f"{share}{tokens:,} tokens x {each / 1e9:.3g} GFLOP (2 x active parameters, attention)"
    writing = (
        left / DISK_BYTES_PER_SECOND,
        f"writing {format_gb(left)} at {DISK_RATE}, assumed",
    )
    bounds = [writing]
    if demand.layered:
        # once for all batches, while a layer computes the next one is read
        once = info.weights.checkpoint_bytes
        bounds.append((once / DISK_BYTES_PER_SECOND, f"reading {format_gb(once)} of weights at {DISK_RATE}, assumed"))
    if not gpus:
        rate, reason = _processor(info.dtype, offer)
        return _slowest([(flops / rate, f"{work} at {rate / 1e9:.0f} GFLOP/s, {reason}"), *bounds])
    cards = {name: find_card(name) for name in gpus}
    known = {name: card for name, card in cards.items() if card is not None}
    if len(known) < len(cards):
        unknown = ", ".join(name for name, card in cards.items() if card is None)
        return Step(name="pass", seconds=None, assumption=f"the speed of {unknown} is not known, so no number is given")
    # split between layers, GPUs work one after the other: several are no faster than one
    name = min(known, key=lambda name: getattr(known[name], info.dtype))
    peak, memory = getattr(known[name], info.dtype) * 1e12, min(card.memory for card in known.values()) * 1e9
    size = info.weights.memory_bytes
    rate = peak * GPU_EFFICIENCY
    reason = f"{GPU_EFFICIENCY:g}, assumed, of the {peak / 1e12:g} of {name} in {info.dtype}"
    reading = f"reading {format_gb(size)} of weights for each of {batches:,} batches at {memory / 1e9:,.0f} GB/s"
    computing = f"{work} at {rate / 1e12:.3g} TFLOP/s, {reason}"
    launches = launches_of_experts(info, gpus)
    if launches:
        each_batch = f"{launches:,} products of single experts in each of {batches:,} batches"
        computing += f", and {each_batch}, {LAUNCH_SECONDS * 1e6:g} µs to start each, assumed"
    seconds = flops / rate + batches * launches * LAUNCH_SECONDS
    return _slowest([(seconds, computing), (batches * size / memory, reading), *bounds])


def launches_of_experts(info: ModelInfo, gpus: tuple[str, ...]) -> int:
    """Products of single experts that a pass starts one after the other; 0 where one kernel multiplies a layer's experts.

    They come on top of the arithmetic: the device is waited for before each layer's, so they don't run ahead of it.
    """
    if not info.num_experts:
        return 0
    found = [capability_of(name) for name in gpus]
    grouped = info.experts_implementation == "grouped_mm"
    if grouped and all(one is not None and one >= GROUPED_FROM for one in found):
        return 0
    return 2 * len(info.anatomy.moe_layers) * info.num_experts


def flops_per_token(info: ModelInfo, positions: int) -> float:
    """2 x active parameters, and attention to half of the sequence: products with keys and with values, in each layer."""
    heads_width = info.anatomy.widths.get("o_in", info.hidden_size)
    return 2 * info.active_parameters + 2 * positions * heads_width * info.num_layers


def _processor(dtype: str, offer: Offer) -> tuple[float, str]:
    """Operations a second without a GPU, and where the number comes from."""
    if offer.provider != DEFAULT_PROVIDER:
        return CORE_FLOPS * offer.facts.cpus, f"{CORE_FLOPS / 1e9:g} a core, assumed"
    product = f"a {dtype} product of {MEASURE_SIZE} x {MEASURE_SIZE} matrices just reached here"
    return measure_flops(dtype) * PASS_EFFICIENCY, f"{PASS_EFFICIENCY:g} of what {product}"


def _slowest(bounds: list[tuple[float, str]]) -> Step:
    seconds, text = max(bounds)
    others = "; ".join(f"{other}: {format_seconds(lasts)}" for lasts, other in bounds if other != text)
    return Step(name="pass", seconds=round(seconds, 1), assumption=f"decided by {text} ({others})")


def _analysis(executor: str, size: int, facts: Facts) -> Step:
    if executor.startswith("dask="):
        return Step(name="analysis", seconds=None, assumption="the cores of the Dask cluster are not known")
    asked = int(executor.partition("=")[2] or facts.cpus)
    cores = max(1, min(asked, facts.cpus))
    seconds = size / 1e9 * ANALYSIS_CORE_SECONDS_PER_GB / cores
    text = f"{format_gb(size)} at {ANALYSIS_CORE_SECONDS_PER_GB:g} s a gigabyte and core, {cores} cores"
    reading = size / DISK_BYTES_PER_SECOND
    if size > facts.ram_available_bytes and reading > seconds:
        seconds, text = (
            reading,
            f"{format_gb(size)}, more than memory keeps, read at {DISK_RATE}, assumed",
        )
    compiling = f"and {COMPILE_SECONDS:g} s to compile where that is not done yet"
    return Step(name="analysis", seconds=round(seconds + COMPILE_SECONDS, 1), assumption=f"{text}, {compiling}")


def _formats(demand: Demand, facts: Facts) -> list[Step]:
    """Measuring the error of number formats on their sample of tokens; nothing where none are asked for."""
    asked, layout = demand.spec.formats, demand.layout
    if not asked.formats:
        return []
    tokens = min(asked.format_tokens, layout.num_sequences * layout.positions)
    size = tokens * len(layout.layers) * sum(layout.stored.values()) * layout.itemsize
    tries = FORMAT_TRIES * len(asked.formats)
    seconds = size * tries / FORMAT_BYTES_PER_CORE_SECOND / max(1, facts.cpus)
    return [
        Step(
            name="formats",
            seconds=round(seconds + COMPILE_SECONDS, 1),
            assumption=f"{tokens:,} tokens, {format_gb(size)}, at most {tries} times at "
            f"{format_mb_per_second(FORMAT_BYTES_PER_CORE_SECOND)} a core, {facts.cpus} cores",
        )
    ]


def _probe(demand: Demand, offer: Offer, gpus: tuple[str, ...]) -> list[Step]:
    """The passes of a probe, with the model loaded once more; nothing where none is asked for."""
    spec, info = demand.spec, demand.model
    if not spec.probe.asked:
        return []
    passes = count_passes(
        spec, len(demand.layout.layers), has_experts=info.num_experts is not None, experts=info.num_experts or 0
    )
    sequences = min(spec.probe.probe_sequences, demand.layout.num_sequences)
    tokens = sequences * demand.layout.positions
    dtype = "float32" if spec.probe.probe_dtype == "float32" else info.dtype
    flops = passes * PROBE_FACTOR * tokens * flops_per_token(info, demand.layout.positions)
    work = f"at most {passes:,.0f} passes over {tokens:,} tokens, {PROBE_FACTOR:g} of a pass each for the edits"
    load = info.weights.checkpoint_bytes / DISK_BYTES_PER_SECOND + IMPORT_SECONDS
    if gpus:
        cards = [find_card(name) for name in gpus]
        known = [card for card in cards if card is not None]
        if len(known) < len(cards):
            return [Step(name="probe", seconds=None, assumption=f"{work}, on a GPU whose speed is not known")]
        rate = min(getattr(card, dtype) for card in known) * 1e12 * GPU_EFFICIENCY
        reason = f"{GPU_EFFICIENCY:g}, assumed, of the GPU's peak in {dtype}"
    else:
        rate, reason = _processor(dtype, offer)
    seconds = flops / rate + load
    return [
        Step(
            name="probe",
            seconds=round(seconds, 1),
            assumption=f"{work}, at {rate / 1e9:,.0f} GFLOP/s, {reason}, and loading the model again",
        )
    ]


def measure_flops(dtype: str) -> float:
    """Floating-point operations a second of a matrix product on this processor, best of a fraction of a second."""
    import torch

    a = torch.randn(MEASURE_SIZE, MEASURE_SIZE).to(getattr(torch, dtype))
    best, until = math.inf, time.monotonic() + 0.4
    while time.monotonic() < until or best is math.inf:
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * MEASURE_SIZE**3 / best
