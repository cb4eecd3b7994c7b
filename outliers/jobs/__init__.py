"""Detached jobs: a step that goes on when the program that started it is gone.

In: a command and a folder. Out: a folder for each attempt with its events, its result and how it ended.
A newcomer reads `jobs`; `supervisor` is the process that watches one job.
"""
