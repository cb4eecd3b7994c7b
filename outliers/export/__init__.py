"""What a study found, in the formats that quantizers read: importance matrices, scales, lists of modules to leave alone.

In: the private summary of a study and the description of its model (`source`). Out: the bytes of one file, or two, for
another program (`imatrix`, `scales`, `recipes`, `configs`), which `files` writes. `formats` has the table, from which the
command is made. No model is loaded. A newcomer may add a format, with a test in which that program reads it.
"""
