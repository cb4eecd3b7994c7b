"""Finds the systematic outlier features of large language models, exactly and at scale.

The science and the machines: nothing here imports Prefect, and all of it runs alone on the machine with the data. For a
notebook:

    from outliers import StudySpec, plan, run_study, open_study, open_capture, list_studies

docs/python.md shows each of them. They are imported at their first use: `import outliers` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outliers.version import __version__

if TYPE_CHECKING:
    from outliers.api import StudySpec, list_studies, open_capture, open_study, plan, run_study

__all__ = ["StudySpec", "__version__", "list_studies", "open_capture", "open_study", "plan", "run_study"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from outliers import api

    return getattr(api, name)
