"""The compiled loops over one tile of a chunk. numba compiles them once on a machine.

In: bits of values and arrays of counts. Out: the counts, added to. The loops know no files and no sites; `arguments` names
what they are given. Change a loop together with its brute-force oracle in the tests.
"""
