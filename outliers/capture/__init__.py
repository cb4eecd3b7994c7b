"""The forward pass: a model is loaded, its sites are read, and what they give goes to the store.

In: a `Prepared` and a workspace. Out: a capture. Every number is what the model computed, bit for bit.
A newcomer reads `extract`; `ring` and `copies` move values from the device to the writers.
"""
