"""Where artifacts go: a folder or an S3 bucket, behind one small interface.

In: keys and bytes. Out: whole objects, or an error of `outliers.errors`.
A newcomer adds a module next to `bucket` and names it in `open`.
"""
