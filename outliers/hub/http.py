"""The HTTP library that huggingface_hub makes its requests with: httpx2 from its version 2.0 on, httpx before.

Both have the same names and share no class: where the wrong one is imported, its client is refused and its errors pass every
`except`. So whatever makes or awaits a request to the hub imports `httpx` from here. Prefect's requests are httpx's.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx
else:
    # by its version: importing it takes half a second, and either library may be there for another package's sake
    httpx = import_module("httpx2" if int(metadata.version("huggingface_hub").partition(".")[0]) >= 2 else "httpx")


def xet_errors() -> tuple[type[Exception], ...]:
    """What a download from Xet storage raises: one error from version 2.0 on, two without a common base before."""
    errors = import_module("huggingface_hub.errors")
    return tuple(getattr(errors, name) for name in ("XetError", "XetDownloadError") if hasattr(errors, name))


__all__ = ["httpx", "xet_errors"]
