"""A study as a person reads it: the page and its plots.

In: summary.json, features.parquet, tokens.json. Out: report.html and PNG files. No script, and nothing is loaded.
A newcomer changes `templates/report.html` and looks at the page.
"""
