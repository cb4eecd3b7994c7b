"""The compiled loops over one tile of a chunk. numba compiles them once on a machine.

In: bits of values and arrays of counts. Out: the counts, added to. They know no files and no sites.
A newcomer changes a loop together with its brute-force oracle in the tests.
"""
