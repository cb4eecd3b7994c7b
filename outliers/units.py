"""Bytes as a person reads them: two amounts that differ never look alike.

Arithmetic and text. Before it: nothing. After it: every refusal that has to give what is needed and what there is.
"""

from __future__ import annotations

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
