"""A capture on disk: chunks of a Zarr group, the journal of the complete sequences, and the conditions of the capture.

In: arrays of activations. Out: the same bytes, or `CorruptCapture`.
The format is a contract (docs/design.md). Start with `chunks` and `journal`.
"""
