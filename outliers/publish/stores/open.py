"""The artifact store that a URL names: file:///folder or s3://bucket/prefix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from outliers.errors import TargetError
from outliers.publish.stores.base import Store
from outliers.publish.stores.folder import FolderStore
from outliers.spec import has_login

_SHAPE = "an artifact store is s3://bucket/prefix or file:///folder"


@contextlib.contextmanager
def opened(target: str) -> Iterator[Store]:
    """The store at the URL `target`, closed afterwards; it connects at the first use. TargetError for another URL."""
    store = _store(target)
    try:
        yield store
    finally:
        store.close()


def _store(target: str) -> Store:
    if has_login(target):
        raise TargetError(f"the target's URL carries a user or password; {_SHAPE}, and keys come from the environment")
    parts = urlsplit(target)
    if parts.query or parts.fragment:
        raise TargetError(f"'{target}' has a query or fragment; {_SHAPE}")
    if parts.scheme == "file" and not parts.netloc and parts.path.strip("/") and parts.path.startswith("/"):
        return FolderStore(target.rstrip("/"), Path(parts.path))
    if parts.scheme == "s3" and parts.netloc:
        try:
            from outliers.publish.stores.bucket import BucketStore
        except ImportError as error:
            message = f"'{target}' needs the package {error.name}: pip install 'outlier-features[flows]'"
            raise TargetError(message) from error
        return BucketStore(target.rstrip("/"), parts.netloc, parts.path.strip("/"))
    raise TargetError(f"'{target}' is not an artifact store; {_SHAPE}")
