"""The address at which a browser opens what lies in a store, where there is one."""

from __future__ import annotations

from urllib.parse import quote

HUB = "https://huggingface.co"


def web_link(url: str, *, file: bool = False) -> str | None:
    """The page of a folder in a store, or with `file` of a file, by its URL there; None for s3://, file:// and folders here.

    hf://datasets/ORG/NAME/... has a page on the hub, whichever endpoint this process uses.
    """
    if url.startswith(("https://", "http://")):
        return url
    if not url.startswith("hf://datasets/"):
        return None
    parts = url.removeprefix("hf://datasets/").rstrip("/").split("/")
    if len(parts) < 2:
        return None
    repo, path = "/".join(parts[:2]), "/".join(parts[2:])
    return f"{HUB}/datasets/{quote(repo)}" + (f"/{'blob' if file else 'tree'}/main/{quote(path)}" if path else "")
