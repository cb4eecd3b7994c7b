"""A capture a layer at a time (`--schedule layers`), for models larger than the memory; the same bits as the whole pass.

`run` goes over layers and batches: `weights` loads one layer, `standins` lets the base model's own forward run with that one
alone, `spool` keeps the hidden states between layers on disk. `seams` checks the names of transformers that this uses.
"""
