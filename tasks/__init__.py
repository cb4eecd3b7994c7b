"""Prefect tasks: thin wrappers, each one call into `outliers.dispatch`, which does the work and knows no Prefect.

`steps.TaskSteps` hands them to `outliers.dispatch.study.dispatch_study`; `progress.TaskReporter` shows what they say.
"""
