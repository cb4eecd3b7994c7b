"""Many studies from one file: which ones, in which order, and what came of each.

In: a TOML file. Out: a list of specs with their plans, and outcomes. It starts nothing itself.
A newcomer reads `sweep`.
"""
