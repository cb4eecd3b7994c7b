"""Prefect flows, and the command `outliers`."""
