"""The verdict: which formats a model can be quantized to, how, and what must be left alone.

In: the errors of formats, the sensitivity map and the probes of a study. Out: advice.json and one paragraph. It says nothing
that was not measured.
"""
