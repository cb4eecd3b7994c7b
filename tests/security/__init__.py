"""Attacks, a file a boundary: what is not trusted sends what it can, and nothing comes of it."""
