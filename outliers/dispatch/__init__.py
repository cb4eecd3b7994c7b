"""What runs a study's steps on machines: files sent, jobs followed, leases held. No Prefect.

In: a `Prepared` and a machine. Out: results on this side.
A newcomer reads `transfer`.
"""
