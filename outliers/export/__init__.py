"""What a study found, in the formats that quantizers read: importance matrices, scales, lists of modules to leave alone.

In: the private summary of a study, or its results. Out: one file for another program. A newcomer may add a format, with a test
in which that program reads it.
"""
