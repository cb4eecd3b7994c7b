"""What Prefect calls when a run changes state: runs that have ended give back what they hold.

In: a flow run and its state. Out: machines released, records of runs that were cancelled or lost.
"""
