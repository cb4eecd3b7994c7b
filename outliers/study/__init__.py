"""A study before it runs: its ids, and what it needs.

In: a `StudySpec`. Out: a `Prepared` with `capture_id` and `study_id`, the layout of its arrays, and the memory it takes.
Nothing is computed with a model here. A newcomer reads `prepare`.
"""
