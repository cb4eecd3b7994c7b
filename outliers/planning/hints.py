"""What would make a study faster or cheaper on the machines that fit: sentences, each with its reason and its numbers.

Nothing is chosen here: a batch's size is part of the study's id, and the machine is the user's to ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from outliers.machines.base import MachineRequest, Provider
from outliers.planning.estimate import Step, total_seconds
from outliers.planning.offers import Candidate, on_offer, steps_on
from outliers.study.demand import Demand, demand_of
from outliers.units import format_seconds

BATCHES = (4, 8)
"""Sequences a batch that are recommended for a mixture of experts on a GPU."""


def hints(
    demand: Demand, provider: Provider, request: MachineRequest, found: Sequence[Candidate], left: int
) -> tuple[str, ...]:
    """What is worth knowing of the first of the machines that fit. left: bytes of the capture that it has to write."""
    if not found:
        return ()
    first = found[0]
    texts = (_idle(demand, provider, request, first, left), _batch(demand, first, left))
    return tuple(text for text in texts if text is not None)


def _idle(demand: Demand, provider: Provider, request: MachineRequest, first: Candidate, left: int) -> str | None:
    """GPUs of the first machine that no process would use, why, and a cheaper machine without them, where there is one."""
    if not first.idle_gpus:
        return None
    gpus, used = first.allowed, len(first.used_gpus) * first.processes
    text = f"{first.idle_gpus} of the {gpus} GPUs of {first.offer.name} would idle, {_why(demand, first)}"
    if not first.offer.price_per_hour or demand.spec.compute.gpu_count in (None, 0):
        return text
    fewer = replace(request, gpu_count=used)
    others = [on_offer(demand, offer) for offer in provider.offers(fewer)[0] if len(offer.facts.gpus) < gpus]
    cheaper = [one for one in others if one.placement and one.offer.price_per_hour < first.offer.price_per_hour]
    if not cheaper:
        return text
    best = min(cheaper, key=lambda one: one.offer.price_per_hour)
    lasts = format_seconds(total_seconds(steps_on(demand, best, left)))
    return (
        f"{text}: --gpu-count {used} takes {best.offer.name} for ${best.offer.price_per_hour:.2f} an hour instead of "
        f"${first.offer.price_per_hour:.2f}, about {lasts}"
    )


def _why(demand: Demand, first: Candidate) -> str:
    compute, size = demand.spec.compute, len(first.used_gpus)
    if compute.processes is not None:
        return f"for --processes is {compute.processes}"
    if demand.most_processes <= first.processes:
        batches = demand.most_processes
        return f"for there {'is' if batches == 1 else 'are'} {batches} batch{'es' * (batches > 1)} to read"
    if first.allowed // size > first.processes and len({gpu.name for gpu in first.offer.facts.gpus}) == 1:
        return "for main memory holds no more processes (--min-cpu-ram)"
    return f"for a process takes {size} of one kind"


def _batch(demand: Demand, first: Candidate, left: int) -> str | None:
    """Larger batches for a mixture of experts on GPUs, with what they would change by the estimate."""
    info, capture = demand.model, demand.spec.capture
    if not info.num_experts or not first.placement or capture.batch_sequences >= BATCHES[0]:
        return None
    if demand.spec.corpus.num_sequences < BATCHES[0] * first.processes:
        return None
    text = (
        f"{info.source.name} is a mixture: batches of {BATCHES[0]} to {BATCHES[1]} sequences (--batch-sequences) share "
        f"the starting of {info.num_experts} experts a layer, two waits for the GPU a layer and the reading of all weights among "
        "more tokens; it is part of the study's id"
    )
    more = capture.model_copy(update={"batch_sequences": BATCHES[0]})
    spec = demand.spec.model_copy(update={"capture": more})
    larger = demand_of(spec, info)
    candidate = on_offer(larger, first.offer)
    if candidate.too_small is not None:
        return f"{text}; its GPUs do not hold a batch of {BATCHES[0]}"
    now, then = (_pass(one, where, left) for one, where in ((demand, first), (larger, candidate)))
    if now is None or then is None or then >= now:
        return text
    return f"{text}: by this estimate the pass takes {format_seconds(then)} with {BATCHES[0]}, {format_seconds(now)} as asked"


def _pass(demand: Demand, where: Candidate, left: int) -> float | None:
    steps: tuple[Step, ...] = steps_on(demand, where, left)
    return next((step.seconds for step in steps if step.name == "pass"), None)
