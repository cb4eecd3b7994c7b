"""The project in Python: what a notebook imports, as `from outliers import ...`.

In: a `StudySpec`, an id, a folder, a URL. Out: a `Study` with its results as frames, a capture as lazy arrays. A study runs in
the process that asks for it: no Prefect, no other machine. A newcomer adds a function here, in `__all__` of `outliers`, and in
docs/python.md.
"""

from __future__ import annotations

from outliers.api.captures import open_capture
from outliers.api.running import plan, run_study
from outliers.api.studies import Study, list_studies, open_study
from outliers.spec import StudySpec

__all__ = ["Study", "StudySpec", "list_studies", "open_capture", "open_study", "plan", "run_study"]
