"""Amounts of bytes that are shown next to each other."""

from __future__ import annotations

import pytest

from outliers.units import amounts


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((300_000, 900_000), ("300.00 KB", "900.00 KB")),
        ((300_000, 1_100_000), ("0.30 MB", "1.10 MB")),
        ((7_000_000_000, 6_999_999_999), ("7.000000000 GB", "6.999999999 GB")),
        ((1_342_000_000_000, 688_500_000_000), ("1.34 TB", "0.69 TB")),
        ((5, 5), ("5 bytes", "5 bytes")),
        ((0, 999), ("0 bytes", "999 bytes")),
    ],
)
def test_amounts(numbers, said):
    assert amounts(*numbers) == said
