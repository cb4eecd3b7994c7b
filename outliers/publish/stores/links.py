"""The address at which a browser opens what lies in a store, where there is one."""

from __future__ import annotations

from urllib.parse import quote

HUB = "https://huggingface.co"


def web_link(url: str) -> str | None:
    """The page of a study, or of a file, whose URL in a store is `url`; None for s3://, file:// and folders.

    hf://datasets/ORG/NAME/... has a page on the hub, whichever endpoint this process is told to use.
    """
    if url.startswith(("https://", "http://")):
        return url
    if not url.startswith("hf://datasets/"):
        return None
    parts = url.removeprefix("hf://datasets/").rstrip("/").split("/")
    if len(parts) < 2:
        return None
    repo, path = "/".join(parts[:2]), "/".join(parts[2:])
    return f"{HUB}/datasets/{quote(repo)}" + (f"/tree/main/{quote(path)}" if path else "")
