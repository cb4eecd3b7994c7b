"""What leaves, and how: the manifest, the list of names that may leave, the stores.

In: a results folder. Out: objects under one study's prefix, whole or invisible.
A newcomer reads `allowlist` first; `stores` has one file for each kind of target.
"""
