"""Many studies together: the table, the page, and two studies side by side.

In: a store of published studies. Out: atlas.parquet, atlas.html, a comparison.
A newcomer adds a column in `row`.
"""
