"""Machines: this computer, hosts over ssh, rented ones, behind one protocol (`base`).

In: offers and requirements. Out: a machine that takes files, runs jobs, reports events, and is released.
Some of it runs on the machine itself: `agent`, `lease`, `check`. A newcomer adds a provider: a module, and a line in
`providers`.
"""
