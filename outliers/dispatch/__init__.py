"""What runs a study's steps on machines: files sent, jobs followed, leases held. No Prefect.

In: a `Prepared` and a machine. Out: results on this side.
`study_run` is one run and what it shares, `study` puts the steps in order, `steps` has them one by one, `run` follows a job,
`leases` and `shard` hold its machines. A newcomer reads `study`, then `transfer`.
"""
