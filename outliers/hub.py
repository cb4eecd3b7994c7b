"""A branch or tag of the Hugging Face hub -> the commit it is now, so that a study names what can't move.

Knows names and revisions, nothing of what is in them. Before it: a spec. After it: `models`, `documents`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outliers.errors import BadInput, HubUnavailable

SECONDS = 20


@dataclass(frozen=True)
class Resolved:
    """What a name on the hub is now: its commit, and whether everybody may read it."""

    commit: str
    public: bool


def resolve(kind: Literal["model", "dataset"], name: str, revision: str | None, refuse: type[BadInput]) -> Resolved:
    """The commit of `revision` (None: main) of a model or data set; what is cached here serves when the hub is off.

    Raises `refuse` where there is no such thing or this account may not see it, HubUnavailable when nothing answers.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    asked = revision or "main"
    unknown = f"'{name}' is no folder, file or built-in"
    if constants.is_offline_mode():
        commit = _cached_commit(kind, name, asked)
        if commit is None:
            raise refuse(f"{unknown}, and the hub is switched off (HF_HUB_OFFLINE) with nothing cached for '{asked}'")
        return Resolved(commit, public=False)
    look_up = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        found = look_up(name, revision=asked, timeout=SECONDS)
        return Resolved(str(found.sha), public=not found.private and not found.gated)
    except GatedRepoError as error:
        raise refuse(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise refuse(f"{name} has no revision '{asked}'") from error
    except RepositoryNotFoundError as error:
        raise refuse(f"{unknown}, and no {kind} of the hub that this account may see") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise HubUnavailable(f"{unknown}, and the hub did not answer: {type(error).__name__}: {error}") from error


def _cached_commit(kind: str, name: str, revision: str) -> str | None:
    """The commit of a model whose config is in the hub's cache here; a streamed data set leaves nothing there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision) if kind == "model" else None
    return Path(found).parent.name if isinstance(found, str) else None
