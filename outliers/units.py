"""Bytes, seconds and prices as a person reads them.

Two amounts in one message never look alike where they differ (`amounts`).
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

SCALES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("bytes", 1))


def amounts(first: int, *others: int, unit: str | None = None, digits: int = 2) -> tuple[str, ...]:
    """Bytes in one unit, with at least `digits` digits, and more until the first differs from each of the others.

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


def in_gb(first: int, *others: int) -> tuple[str, ...]:
    """Bytes in GB (10^9), with one digit, and more until the first differs from all others: `63.0 GB`."""
    texts: tuple[str, ...] = ()
    for digits in range(1, 10):
        texts = tuple(f"{number / 1e9:.{digits}f} GB" for number in (first, *others))
        if texts[0] not in texts[1:]:
            break
    return texts


def format_gb(size: float) -> str:
    """Bytes in GB (10^9): `3.22 GB`."""
    return f"{size / 1e9:.2f} GB"


def format_mb_per_second(bytes_per_second: float) -> str:
    """A rate in MB (10^6 bytes): `500 MB/s`."""
    return f"{bytes_per_second / 1e6:.0f} MB/s"


def format_seconds(seconds: float) -> str:
    """`45 s`, `14 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def format_price(price_per_hour: float, machines: int) -> str:
    """`at $1.00 an hour`, or of several machines `on 4 machines at $1.00 an hour each`."""
    one = f"at ${price_per_hour:.2f} an hour"
    return one if machines == 1 else f"on {machines} machines {one} each"


def format_progress(count: float, unit: str) -> str:
    """An amount of work done, or a rate: `12.5 MB` and `3.22 GB` of `bytes`, `1,024 tokens`, `0.25 sequences`."""
    if unit == "bytes":
        return format_gb(count) if count >= 1e8 else f"{count / 1e6:.1f} MB"
    return f"{count:,.0f} {unit}" if count >= 10 or count == int(count) else f"{count:.2g} {unit}"


def _decimal(number: Fraction, places: int) -> str:
    """A number with `places` digits behind the point, without the rounding of a float."""
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
