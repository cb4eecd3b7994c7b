"""What a change in the model does to its predictions: zeroed features, quantized inputs, single weights, prefix tokens.

In: a study, its corpus and model, a ProbeSpec. Out: a journal of losses and divergences a sequence, and from it probes.json
and sensitivity.parquet. A newcomer may add a change in `changes`, with a test that edits the model by other means.
"""
