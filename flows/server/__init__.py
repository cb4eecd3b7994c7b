"""Prefect's server and how it is reached: the command's own one, `make ui`, passwords, and who may ask.

In: options and a home folder. Out: a server on loopback that asks for a password and checks Host and Origin.
"""
