"""What other libraries print by themselves, switched off before they are imported."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Their progress bars would break the ones shown here; Prefect's console would repeat lines and errors."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
