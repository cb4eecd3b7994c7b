"""Numbers and texts as a person reads them. Two amounts of bytes that differ never look alike.

Arithmetic and text, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

SCALES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("bytes", 1))


def amounts(first: int, *others: int, unit: str | None = None, digits: int = 2) -> tuple[str, ...]:
    """Bytes in one unit, with at least `digits` digits and as many as it takes to tell the first from each other.

    `unit`: one of SCALES; None takes the largest that the largest of the numbers fills.
    """
    most = max(map(abs, (first, *others)))
    name, scale = next(
        (name, scale) for name, scale in SCALES if name == unit or (unit is None and most >= scale) or scale == 1
    )
    if scale == 1:
        return tuple(f"{number:,} {name}" for number in (first, *others))
    texts: tuple[str, ...] = ()
    for places in range(digits, 13):
        texts = tuple(f"{_decimal(Fraction(number, scale), places)} {name}" for number in (first, *others))
        if all(text != texts[0] or other == first for text, other in zip(texts[1:], others, strict=True)):
            break
    return texts


def _decimal(number: Fraction, places: int) -> str:
    """A number with so many digits behind the point, without the rounding of a float."""
    whole = round(number * 10**places)
    sign, text = "-" if whole < 0 else "", str(abs(whole)).rjust(places + 1, "0")
    return f"{sign}{text[:-places]}.{text[-places:]}"


def plural(count: int) -> str:
    """The ending of a noun: `layer{plural(2)}` is layers."""
    return "" if count == 1 else "s"


def format_aligned(value: float) -> str:
    """A value for a column of a table: two decimals, none from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def clip(text: object, max_characters: int, *, keep_end: bool = False) -> str:
    """`text` cut to `max_characters`, with … where it was cut."""
    whole = str(text)
    if len(whole) <= max_characters:
        return whole
    return "…" + whole[1 - max_characters :] if keep_end else whole[: max_characters - 1] + "…"


def format_ranges(numbers: Iterable[int], separator: str = ", ", *, half_open: bool = False) -> str:
    """Ascending integers as compact ranges: `0-3, 7`; with `half_open` as --sequences takes them: `0:4, 7:8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if half_open:
        return separator.join(f"{first}:{last + 1}" for first, last in runs)
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
