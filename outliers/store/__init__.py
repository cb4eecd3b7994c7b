"""A capture on disk: chunks of a Zarr group, the journal that says which are whole, the conditions they were made under.

In: arrays of activations. Out: the same bytes, or `CorruptCapture`.
The format is a contract (docs/formats.md). A newcomer reads `chunks` and `journal`.
"""
