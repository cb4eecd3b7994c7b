"""Compiled loops that sum the error of number formats over a tile of captured values.

In: bits of a tile. Out: sums by feature, float64. A newcomer gives a new format a code and a row function in `rules`.
"""
