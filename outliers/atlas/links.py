"""Where a row of the atlas leads: the study's own page, by an address that a browser opens from where the atlas lies.

A page next to its store has relative links, so that both can be copied or served together. It reads nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, urlsplit

from outliers.errors import BadInput
from outliers.publish.stores.links import web_link
from outliers.spec import has_login

FILE = "file://"


def check_base(base: str) -> str:
    """An address below which a store is served, without a slash at its end. Raises BadInput."""
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment or has_login(base):
        raise BadInput(
            "--links takes the address at which the store is served: https://host/path, without login or query"
        )
    return base.rstrip("/")


def report_link(report: str | None, store: str, page: Path | None, base: str | None) -> str | None:
    """The address of a study's page; None where no browser can open it.

    report: its URL in the store at `store`. page: the file of the atlas; None: its links are absolute. base: the address at
    which the store is served, for one that no browser opens by itself, such as s3://.
    """
    if report is None:
        return None
    if base is not None:
        return f"{base}/{quote(report.removeprefix(store).strip('/'))}"
    if not report.startswith(FILE):
        return web_link(report, file=True)
    path, root = Path(report.removeprefix(FILE)), Path(store.removeprefix(FILE))
    if page is not None and (page.parent.is_relative_to(root) or root.is_relative_to(page.parent)):
        return quote(os.path.relpath(path, page.parent))
    return path.as_uri()
