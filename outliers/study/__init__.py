"""A study before it runs: its ids, and what it needs.

In: a `StudySpec`. Out: a `Prepared` with `capture_id` and `study_id`, and its `Demand`: the layout of its arrays and the
memory it takes, which everything above reads instead of computing it again.
Nothing is computed with a model here. A newcomer reads `prepare`.
"""
