"""The URLs of artifact stores: which forms there are, and what of one is refused before anything is asked of a server."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from outliers.spec.words import has_login

STORE_SCHEMES = ("file", "s3", "hf")
STORE_SHAPES = "s3://bucket/prefix, hf://datasets/ORG/NAME/prefix or file:///folder"
STORE_PATTERN = r"^(s3://[^/@?#]+(/[^?#]*)?|file:///[^?#]+|hf://datasets/[^/@?#]+/[^/@?#]+(/[^@?#]*)?)$"
"""`publish_to` as a JSON schema can say it, so that a Prefect server refuses a URL with a login before it keeps the run's
parameters. It lets through every URL that StudySpec accepts; StudySpec refuses more."""
DATASETS = "hf://datasets/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""A step of a repository's name, as the hub has them."""
_STEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_target_url(url: str) -> str:
    """A URL of an artifact store without a slash at its end. Raises ValueError with what is allowed."""
    parts = urlsplit(url)
    if has_login(url):
        raise ValueError(
            "a URL must not carry a user or password: keys come from the environment (AWS_ACCESS_KEY_ID, HF_TOKEN)"
        )
    if parts.scheme not in STORE_SCHEMES:
        raise ValueError(f"'{url}' is not {STORE_SHAPES}")
    if parts.query or parts.fragment:
        raise ValueError(f"'{bare_url(url)}' has a query or fragment; give {STORE_SHAPES}")
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/") or parts.path == "/"):
        raise ValueError(f"'{url}' is not file:///folder (three slashes and a full path)")
    if parts.scheme == "s3" and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc):
        raise ValueError(f"'{url}' has no valid bucket name: s3://bucket/prefix")
    if parts.scheme == "hf":
        split_dataset(url)
    return url.rstrip("/")


def bare_url(url: str) -> str:
    """A URL without its query and fragment, which may hold a secret and are not repeated in a message."""
    return re.split(r"[?#]", url, maxsplit=1)[0]


def split_dataset(url: str) -> list[str]:
    """ORG, NAME and the steps of the prefix of hf://datasets/ORG/NAME/prefix. Raises ValueError for another URL.

    A revision (NAME@REVISION) is refused: a store is published to, and its branch is main.
    """
    steps = url.removeprefix(DATASETS).rstrip("/").split("/")
    named = url.startswith(DATASETS) and len(steps) >= 2 and all(_NAME.fullmatch(step) for step in steps[:2])
    if not named or not all(_STEP.fullmatch(step) for step in steps[2:]):
        raise ValueError(
            f"'{url}' is not hf://datasets/ORG/NAME, with a prefix of letters, digits, '.', '_' and '-' if you like"
        )
    return steps
