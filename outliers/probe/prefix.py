"""The tokens that come before each sequence, so that what sits on first tokens sits on them: a text, ids, or `auto`."""

from __future__ import annotations

import re

from outliers.corpus.tokenizing import Encoder
from outliers.errors import BadInput
from outliers.probe.asked import AUTO, asked_of
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

_IDS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")


def prefix_ids(prepared: Prepared, workspace: Workspace, massive_token: int | None) -> tuple[int, ...]:
    """The ids of a probe's prefix, none where it asks for none.

    massive_token: the token of the study's largest massive activation. Raises BadInput.
    """
    asked, name = asked_of(prepared.spec).prefix, prepared.model.source.name
    if asked is None:
        return ()
    if asked == AUTO:
        if massive_token is None:
            raise BadInput(
                f"--prefix auto: the study {prepared.study_id} knows no massive activation here; capture resid (--sites) and run "
                "it first, or give a text or ids"
            )
        found: tuple[int, ...] = (massive_token,)
    elif _IDS.fullmatch(asked):
        found = tuple(int(number) for number in asked.split(","))
    else:
        found = tuple(Encoder(prepared.model.source, workspace).encode(asked, len(asked) * 4).ids)
    if not found:
        raise BadInput(f"--prefix {asked!r} has no tokens")
    if max(found) >= prepared.model.vocab_size:
        raise BadInput(
            f"--prefix has the id {max(found)}, and the ids of {name} end at {prepared.model.vocab_size - 1}"
        )
    longest = prepared.corpus.sequence_length + len(found)
    if prepared.model.max_positions is not None and longest > prepared.model.max_positions:
        raise BadInput(
            f"--prefix makes sequences of {longest} tokens, and {name} was made for {prepared.model.max_positions} positions: "
            "study shorter sequences"
        )
    return found
