"""How many processes of one machine read a study side by side, and which GPUs each has: integer arithmetic.

A model that fits k of n GPUs runs n // k times. Each process has GPUs of one kind and whole batches of the corpus, so the bits
are those of one process. Knows bytes and names of GPUs, no model and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from outliers.errors import PlanRefused
from outliers.units import amounts

COORDINATOR_BYTES = 1_000_000_000
"""For the process that starts the others and writes their journal; it loads torch and no weights. Chosen, as PROCESS_BYTES."""


def groups(first: tuple[int, ...], names: Sequence[str], most: int | None) -> tuple[tuple[int, ...], ...]:
    """The GPUs of each process, `first` for the first one: others of the same kind, as many each, in order.

    names: of all GPUs that may be used or not, by number; an empty name for one that may not. most: GPUs in all (None: no
    limit). GPUs of several kinds in `first` leave one process, because others would compute with other kinds.
    """
    if len({names[number] for number in first}) != 1:
        return (first,)
    kind, size = names[first[0]], len(first)
    left = [number for number, name in enumerate(names) if name == kind and number not in first]
    more = [tuple(left[at : at + size]) for at in range(0, len(left) - size + 1, size)]
    allowed = len(more) + 1 if most is None else max(1, most // size)
    return (first, *more)[:allowed]


def fitting(processes: int, each_bytes: int, free_bytes: int) -> int:
    """As many of the processes as main memory holds together, at least one. each_bytes: main memory of one."""
    together = processes
    while together > 1 and memory_of(together, each_bytes) > free_bytes:
        together -= 1
    return together


def memory_of(processes: int, each_bytes: int) -> int:
    """Main memory of that many processes in bytes, with the one that starts them where there are several."""
    return each_bytes * processes + (COORDINATOR_BYTES if processes > 1 else 0)


def check_asked(asked: int, found: int, size: int, gpus: int) -> None:
    """Refuse more processes than the GPUs hold. found: groups of `size` GPUs of one kind, of the `gpus` here."""
    if asked > found:
        raise PlanRefused(
            f"--processes {asked} need {asked * size} GPUs of one kind with enough memory, {size} each, and of the {gpus} here "
            f"{found * size} will do: ask for at most {found}, or leave it out for as many as fit"
        )


def check_memory(asked: int, each_bytes: int, free_bytes: int) -> None:
    """Refuse processes that main memory does not hold together, with both numbers."""
    needed = memory_of(asked, each_bytes)
    if needed > free_bytes:
        wanted, there = amounts(needed, free_bytes, unit="GB")
        raise PlanRefused(
            f"--processes {asked} need {wanted} of memory together, {there} is free: ask for fewer, or leave it out for as many "
            "as fit"
        )
