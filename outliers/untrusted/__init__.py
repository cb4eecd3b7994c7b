"""Input from outside, read as hostile: limits, strict JSON and archives, text that is safe to show.

In: bytes and text of model folders, machines, servers and stores. Out: the same within bounds, or an error.
It imports nothing of this project. A newcomer adds a bound to `bounds`, and the test that sends more than it.
"""
