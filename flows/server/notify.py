"""A message to a webhook when a run fails: `python -m flows.server.notify < FILE`, with the webhook's address in FILE.

The server is the one that PREFECT_API_URL names. It gets a block with the address and an automation of the same name; a second
run replaces both. The address is a secret for most services, so it is read from standard input, and Prefect keeps it encrypted.
The message is one JSON object with `text`, which Slack, Mattermost, Teams and ntfy's JSON take.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import AutomationCore, CallWebhook, EventTrigger, Posture

from outliers.errors import BadInput

NAME = "outliers-failed"
ENDS = ("prefect.flow-run.Failed", "prefect.flow-run.Crashed")
"""A cancel is asked for, and tells nobody."""
TAG = "prefect.tag.outliers"
"""Of every run of our deployments."""
PAYLOAD = (
    '{"text": {{ (flow_run.name ~ " " ~ flow_run.state.name ~ ": " ~ (flow_run.state.message or "no message") ~ " " ~ '
    "(flow_run | ui_url)) | tojson }}}"
)


def notify(address: str) -> str:
    """Set the webhook and the automation up; a sentence. Raises BadInput where that is not an address."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or any(char.isspace() for char in address):
        # never the address itself: it is a secret, and this is shown
        raise BadInput("standard input is not one http:// or https:// address of a webhook: `... < FILE`")
    block = Webhook(method="POST", url=address, headers={"Content-Type": "application/json"})
    kept = block.save(NAME, overwrite=True)
    with get_client(sync_client=True) as client:
        automation = failed_runs(UUID(str(kept)))
        known = client.read_automations_by_name(NAME)
        if known:
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)
        return f"automation {NAME} {'replaced' if known else 'made'} at {_pages(client)}: a run that fails tells {parts.hostname}"


def failed_runs(block: UUID) -> AutomationCore:
    """The automation: each failed run of our deployments, once."""
    return AutomationCore(
        name=NAME,
        description="A study, a sweep or the look for leases has failed. Made by flows.server.notify.",
        enabled=True,
        trigger=EventTrigger(
            expect=set(ENDS),
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": TAG},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[CallWebhook(block_document_id=block, payload=PAYLOAD)],
    )


def _pages(client: SyncPrefectClient) -> str:
    return os.environ.get("PREFECT_UI_URL") or str(client.api_url).removesuffix("/").removesuffix("/api")


def main(argv: list[str] | None = None) -> int:
    """`python -m flows.server.notify`."""
    parser = argparse.ArgumentParser(prog="python -m flows.server.notify", description=(__doc__ or "").splitlines()[0])
    parser.parse_args(argv)
    try:
        print(notify(sys.stdin.read().strip()))
    except BadInput as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
