"""The artifact store that a URL names: file:///folder, s3://bucket/prefix or hf://datasets/ORG/NAME/prefix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from outliers.errors import TargetError
from outliers.publish.stores.base import Store
from outliers.publish.stores.folder import FolderStore
from outliers.spec import STORE_SHAPES, bare_url, has_login, split_dataset

_SHAPE = f"an artifact store is {STORE_SHAPES}"


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
        raise TargetError(f"'{bare_url(target)}' has a query or fragment; {_SHAPE}")
    if parts.scheme == "file" and not parts.netloc and parts.path.strip("/") and parts.path.startswith("/"):
        return FolderStore(target.rstrip("/"), Path(parts.path))
    if parts.scheme == "s3" and parts.netloc:
        try:
            from outliers.publish.stores.bucket import BucketStore
        except ImportError as error:
            message = f"'{target}' needs the package {error.name}: pip install 'outlier-features[flows]'"
            raise TargetError(message) from error
        return BucketStore(target.rstrip("/"), parts.netloc, parts.path.strip("/"))
    if parts.scheme == "hf":
        try:
            organisation, name, *prefix = split_dataset(target)
        except ValueError as error:
            raise TargetError(str(error)) from error
        # the HTTP library of the hub takes half a second to import
        from outliers.hub.datasets import DatasetRepo
        from outliers.publish.stores.dataset import DatasetStore

        return DatasetStore(target.rstrip("/"), DatasetRepo(f"{organisation}/{name}"), "/".join(prefix))
    raise TargetError(f"'{target}' is not an artifact store; {_SHAPE}")
