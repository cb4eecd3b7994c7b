"""The corpus: documents read once, in order, and cut into sequences of token ids.

In: a `CorpusSpec` and a tokenizer. Out: token ids, lengths and the hashes that identify them, kept in the workspace.
A newcomer adds a file format in `text_files` or `text_rows`.
"""
