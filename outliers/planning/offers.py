"""Which offers of machines hold a study, and why the others don't: memory, GPUs, disk, packages, price.

Each offer's GPUs are looked at once (`on_offer`), and everything that depends on them uses that answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from outliers.errors import PlanRefused
from outliers.hardware import Gpu
from outliers.hub.cache import cache_is_chosen
from outliers.machines.base import Excluded, MachineRequest, Offer, Provider
from outliers.model.describe import ModelInfo, check_place
from outliers.model.quantization import DEQUANTIZABLE, Place, installed_packages
from outliers.model.weights import ITEM_BYTES
from outliers.planning.download import download_bytes
from outliers.planning.estimate import Step, estimate, over_budget
from outliers.spec import DEFAULT_PROVIDER
from outliers.study.demand import Demand
from outliers.study.placement import Placement, usable
from outliers.study.window import rolling_keeps
from outliers.units import amounts


@dataclass(frozen=True, slots=True)
class Candidate:
    """An offer, and how the model lies on its GPUs.

    `placement`: None where no GPU is used, or where they don't hold the model. `too_small`: why they don't hold it, or None.
    """

    offer: Offer
    placement: Placement | None
    too_small: str | None

    @property
    def used_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that hold the model."""
        return tuple(self.offer.facts.gpus[number] for number in self.placement.gpus) if self.placement else ()

    def check_gpus(self) -> None:
        """Raise PlanRefused where the GPUs don't hold the model."""
        if self.too_small is not None:
            raise PlanRefused(self.too_small)


def on_offer(demand: Demand, offer: Offer) -> Candidate:
    """An offer with the model on its GPUs."""
    if not demand.uses_gpus(offer.facts.gpus):
        return Candidate(offer, None, None)
    try:
        return Candidate(offer, demand.place(offer.facts.gpus, demand.gpus_each), None)
    except PlanRefused as error:
        return Candidate(offer, None, str(error))


def request_for(demand: Demand, capture_bytes_left: int) -> MachineRequest:
    """What a machine must have for this study. Where GPUs are left open its memory is the lesser of both ways to compute;
    `suitable` checks it again once it knows whether the machine has any."""
    compute, count = demand.spec.compute, demand.spec.compute.gpu_count
    both = (demand.ram_bytes, demand.host_ram_bytes)
    least = min(both) if count is None else both[count > 0]
    experts = demand.layout.experts
    # the sums of the experts: on disk, once more while they are replaced, and again in the private summary
    disk = min(capture_bytes_left, demand.held_bytes) + (3 * experts.sums_bytes if experts is not None else 0)
    if capture_bytes_left and not compute.runs_here:
        disk += demand.model.weights.checkpoint_bytes
    elif capture_bytes_left and not cache_is_chosen():  # a download checks the disk of a cache that was moved
        disk += download_bytes(demand.model)
    return MachineRequest.from_spec(compute, needed_ram_bytes=least, needed_disk_bytes=disk)


def check_plan(demand: Demand, provider: Provider, left: int, ram_bytes: int | None = None) -> MachineRequest:
    """The request of a study, limited to the offers that hold it; PlanRefused with every reason where none does.

    left: bytes of the capture that one machine still has to write. ram_bytes: memory that the rest of the study takes where
    it loads no model any more; None where it does. Processes that share this machine are asked for neither: `remaining`
    checks once what they take together.
    """
    request = request_for(demand, left)
    if demand.shares_machine:
        request = replace(request, needed_ram_bytes=0, needed_disk_bytes=0)
    elif ram_bytes is not None:
        request = replace(request, needed_ram_bytes=ram_bytes)
    loads = ram_bytes is None
    holds = loads and not demand.shares_machine
    found, excluded = suitable(demand, provider, request, left, loads=loads, holds=holds)
    if not found:
        why = refusals(excluded)
        raise PlanRefused("no machine fits: " + why[0] if len(why) == 1 else "no machine fits:\n  " + "\n  ".join(why))
    return replace(request, among=tuple(candidate.offer.name for candidate in found))


def suitable(
    demand: Demand,
    provider: Provider,
    request: MachineRequest,
    left: int | None = None,
    *,
    loads: bool = True,
    holds: bool = True,
) -> tuple[tuple[Candidate, ...], tuple[Excluded, ...]]:
    """A provider's offers that hold the study, and the others with the reasons.

    An offer is left out where its GPUs don't hold the model (if the study `loads` one), where its free memory doesn't (if it
    must, `holds`), and where the study would cost more than --max-total-price. `left`: as in `check_plan`.
    """
    offers, excluded = provider.offers(request)
    if loads:
        large = made_plain(demand.model)
        excluded = tuple(replace(item, reason=item.reason + large * _is_of_memory(item.reason)) for item in excluded)
    if any(_is_of_disk(item.reason) for item in excluded):
        hint = rolling_hint(demand)
        excluded = tuple(replace(item, reason=item.reason + hint * _is_of_disk(item.reason)) for item in excluded)
    kept, small = [], []
    for offer in offers:
        candidate = on_offer(demand, offer)
        try:
            if loads:
                _check_methods(demand, candidate)
            _check_room(demand, candidate, loads=loads, holds=holds)
            _check_budget(demand, candidate, left)
        except PlanRefused as error:
            small.append(Excluded(offer.name, str(error)))
        else:
            kept.append(candidate)
    return tuple(kept), (*excluded, *small)


def steps_on(demand: Demand, candidate: Candidate, left: int) -> tuple[Step, ...]:
    """What a study would do on an offer, with seconds. `left`: bytes of the capture still to write. PlanRefused where its
    GPUs don't hold the model."""
    candidate.check_gpus()
    offer = candidate.offer
    names = tuple(gpu.name for gpu in candidate.used_gpus)
    download = download_bytes(demand.model) if offer.provider == DEFAULT_PROVIDER else 0
    return estimate(demand, offer, names, left, download)


def machines_of(demand: Demand, offer: Offer) -> int:
    """How many machines of an offer's kind a study takes: processes on this one are one."""
    return 1 if offer.provider == DEFAULT_PROVIDER else demand.spec.compute.shards


def too_many(processes: int, needed_bytes: int, free_bytes: int) -> str:
    """Why that many processes don't fit on this computer together."""
    needed, free = amounts(needed_bytes, free_bytes, unit="GB")
    return f"{processes} processes need {needed} of memory, {free} is free: ask for fewer --shards"


def refusals(excluded: tuple[Excluded, ...]) -> tuple[str, ...]:
    """Why each machine was left out, as sentences."""
    return tuple(f"{item.name}: {item.reason}" for item in excluded)


def made_plain(info: ModelInfo) -> str:
    """What to add to a refusal for want of memory, where the checkpoint is smaller than the weights in memory."""
    if info.quantization or info.stored_quantization is None:
        return ""
    plain, stored = amounts(info.weight_bytes, info.weights.checkpoint_bytes)
    return (
        f" (the weights take {plain}: they are stored in {info.stored_quantization}, {stored}, and made plain {info.dtype} on "
        "loading)"
    )


def _is_of_memory(reason: str) -> bool:
    """Whether an offer was left out for what the study takes of memory (`base.fits`)."""
    return "the study needs" in reason and "of memory," in reason


def rolling_hint(demand: Demand) -> str:
    """What to add to a refusal for want of disk: what --store rolling would take. Empty where it would not help."""
    if demand.spec.capture.store != "full" or (held := demand.rolling_bytes) is None:
        return ""
    whole, part = amounts(demand.layout.total_bytes, held)
    return (
        f"; --store rolling has at least {part} of the capture on the disk at once, not {whole}: it counts windows of sequences, "
        f"frees them, and keeps the first {rolling_keeps(demand.spec)}"
    )


def _is_of_disk(reason: str) -> bool:
    """Whether an offer was left out for what the study takes of its disk (`base.fits`)."""
    return "the study needs" in reason and "of disk," in reason


def _check_methods(demand: Demand, candidate: Candidate) -> None:
    """PlanRefused where an offer's GPUs or packages can't compute with weights that stay quantized."""
    info, offer = demand.model, candidate.offer
    if info.quantization is None:
        return
    gpus = offer.facts.gpus if demand.uses_gpus(offer.facts.gpus) else ()
    # GPUs that are too small as well are refused for that once the method is right
    used = candidate.used_gpus or gpus
    packages = installed_packages() if offer.provider == DEFAULT_PROVIDER else None
    try:
        check_place(info, Place(tuple((gpu.name, gpu.capability) for gpu in used), packages))
    except PlanRefused as error:
        raise PlanRefused(f"{error}{_plain_is_too_large(info, offer, gpus)}") from error


def _plain_is_too_large(info: ModelInfo, offer: Offer, gpus: tuple[Gpu, ...]) -> str:
    """What to add where --quantization none is the way out, and its weights would not fit the offer either."""
    if info.quantization not in DEQUANTIZABLE:
        return ""
    plain = info.total_parameters * ITEM_BYTES[info.dtype]
    has = sum(usable(gpu.total_bytes) for gpu in gpus) if gpus else offer.facts.ram_available_bytes
    if plain <= has or not all(gpu.total_bytes for gpu in gpus):
        return ""
    needed, free = amounts(plain, has)
    where = "its GPUs have" if gpus else "its memory has"
    return (
        f"; {where} {free} for that, not {needed}: choose more or larger GPUs (--gpu-count, --min-vram), or memory "
        "(--min-cpu-ram) and --gpu-count 0"
    )


def _check_room(demand: Demand, candidate: Candidate, *, loads: bool, holds: bool) -> None:
    """PlanRefused where an offer's memory (`holds`) or its GPUs (`loads`) don't hold the study, and why it takes that much."""
    try:
        if holds:
            _check_memory(demand, candidate.offer)
        if loads:
            candidate.check_gpus()
    except PlanRefused as error:
        raise PlanRefused(f"{error}{made_plain(demand.model)}") from error


def _check_memory(demand: Demand, offer: Offer) -> None:
    """PlanRefused where an offer's free memory does not hold the study, or its processes together."""
    gpus = demand.uses_gpus(offer.facts.gpus)
    processes = demand.spec.compute.shards if offer.provider == DEFAULT_PROVIDER else 1
    one, free = demand.memory_bytes(gpus=gpus), offer.facts.ram_available_bytes
    if one * processes <= free:
        return
    if processes > 1:
        raise PlanRefused(too_many(processes, one * processes, free))
    needed, there = amounts(one, free, unit="GB")
    raise PlanRefused(
        f"the study needs {needed} of memory with{'' if gpus else 'out'} a GPU, {there} is free: "
        "choose a machine with more (--min-cpu-ram)" + ("" if gpus else ", or with GPUs (--gpu-count)")
    )


def _check_budget(demand: Demand, candidate: Candidate, left: int | None) -> None:
    most, price = demand.spec.compute.max_total_price, candidate.offer.price_per_hour
    if most is None or not price:
        return  # nothing is measured for a machine that costs nothing
    if left is None:
        left = demand.shard_layout.total_bytes
    reason = over_budget(steps_on(demand, candidate, left), price, most, machines_of(demand, candidate.offer))
    if reason is not None:
        raise PlanRefused(reason)
