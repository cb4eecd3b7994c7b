"""Counting: one pass over a capture gives the exact counts that every result is made from.

In: a capture. Out: a summary on disk. Sums are of integers or exact, so the order of work does not matter.
Start with `analyze` and `accumulate`; the compiled loops are in `kernels`.
"""
