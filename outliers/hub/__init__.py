"""The model hub: which commit a name means, and its files in the local cache.

In: ids and revisions. Out: commits, headers of safetensors files, downloaded snapshots, or an error that says what to do.
No other package asks the hub. A newcomer starts at `client.resolve`.
"""
