"""Counting inside of the forward pass: the hooks' tensors are counted where they are, and nothing of them is written.

The numbers are those that `counting.analyze` takes from a stored capture, bit for bit. Knows tensors, frames and marks; nothing
of files or models.
"""
