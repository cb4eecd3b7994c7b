"""What a change does to a model: the corpus is read again with a change at a site, and compared with the untouched pass.

`run.probe` is the step. `changes` says what is changed, from a ProbeSpec and a study's findings, without torch. `readers` finds
the modules that read a site, `edits` changes what they receive, `measure` compares with the untouched pass, `session` goes
through the batches, and `numbers` makes of the journal what is published.
"""
