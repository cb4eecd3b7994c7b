"""From counts to findings: which features are outliers by which criteria, and the files that say so.

In: a summary. Out: summary.json, features.parquet, tokens.json. They hold no activations.
`schema` describes the files. A newcomer adds a number there first.
"""
