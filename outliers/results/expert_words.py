"""Sentences about a study's experts, from the part `experts` of its summary.json; the terminal and the report share them."""

from __future__ import annotations

from outliers.results.schema import ExpertsBlock, SuperReading

MAX_NAMED = 6
"""Super experts that a line names."""


def name_of(layer: int, expert: int) -> str:
    """An expert in short: L1E68; shared expert 0 of layer 1, which has the number -1, is L1S0."""
    return f"L{layer}E{expert}" if expert >= 0 else f"L{layer}S{-1 - expert}"


def super_words(block: ExpertsBlock) -> str:
    """The super experts by both readings, in one line; why there are none."""
    ours, published = block.super_experts, block.super_experts_as_published
    if ours is None or published is None:
        return "super experts unknown: of the experts routing alone was read"
    return f"{_named(ours)}; as published: {_named(published)}"


def _named(reading: SuperReading) -> str:
    count = reading.count
    if reading.none_because is not None:
        why = {"tie": "a tie at the top", "zero": "no output above 0", "nothing known": "no output is known"}
        return f"no super expert ({why[reading.none_because]})"
    names = ", ".join(name_of(row.layer, row.expert) for row in reading.experts[:MAX_NAMED])
    more = f" and {count - MAX_NAMED:,} more" if count > MAX_NAMED else ""
    return f"{count:,} super expert{'' if count == 1 else 's'} ({names}{more})"


def coverage_words(block: ExpertsBlock) -> str:
    """How many experts have few tokens, in one line."""
    size = len(block.layers) * block.experts
    counts = {row.at_most: row.experts for row in block.coverage}
    few = max(counts)
    return f"{counts.get(0, 0):,} of {size:,} experts reached by no token, {counts[few]:,} by at most {few:,}"


def coverage_warning(block: ExpertsBlock) -> str | None:
    """What that means for a calibration on this corpus; None where every expert has more tokens."""
    if not any(row.experts for row in block.coverage):
        return None
    return (
        f"{coverage_words(block)}: ranges, scales and Hessians of these experts would rest on that many tokens. A calibration "
        "on this corpus knows little or nothing of them, and calibrators do not say so"
    )


def reach_words(block: ExpertsBlock) -> list[str]:
    """How many tokens would reach every expert."""
    found = []
    for row in block.reach:
        times = "once" if row.times == 1 else f"{row.times:,} times"
        if row.tokens is None:
            found.append(f"to reach every expert {times}: unknown, for some were never reached")
        else:
            found.append(f"to reach every expert {times}: about {row.tokens:,} tokens")
    return found


def expert_lines(block: ExpertsBlock | None) -> list[str]:
    """Two lines about the experts of a study; none without experts."""
    return [] if block is None else [super_words(block), coverage_words(block)]
