"""Finds the systematic outlier features of large language models, exactly and at scale.

The science and the machines: nothing here imports Prefect, and all of it runs alone on the machine with the data.
"""

__version__ = "0.1.0"
