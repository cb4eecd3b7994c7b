"""What a step says while it runs: one line of JSON an event, from the machine that computes to the screen.

In: progress, warnings and log records of a step. Out: lines in a job's events.jsonl, and the same as `Event` values.
A newcomer adds a field to `Event` and to the reader in `lines`, which takes nothing else.
"""
