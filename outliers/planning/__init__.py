"""Which machine a study needs, what it costs, and how long it takes, before anything is rented.

In: a `Prepared` or a spec, and offers of machines. Out: a ranked plan. Estimates say what they are based on.
A newcomer reads `plan`; `offers` says why a machine is refused, `estimate` how long a step takes.
"""
