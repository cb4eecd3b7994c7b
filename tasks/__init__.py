"""Prefect tasks: thin wrappers, each one call into `outliers`, which does the work and knows no Prefect."""
