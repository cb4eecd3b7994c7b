"""The model: where it is, what it is made of, where its sites are, and whether its files are whole.

In: a `ModelSpec`. Out: a `ModelSource` with a revision that can't move, its config and tokenizer, a `ModelInfo`.
No weight is computed with here. A newcomer adds a family to the table in `families`.
"""
