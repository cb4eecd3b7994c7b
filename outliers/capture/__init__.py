"""The forward pass: loads a model, reads its sites, and writes their values to the store.

In: a `Prepared` and a workspace. Out: a capture. Every number is what the model computed, bit for bit.
Start with `extract`; `staging` and `copies` move values from the device to the threads that write.
"""
