"""`outliers captures list|rm` and `outliers verify`: what lies on this disk, and whether it is what was written.

Shows what `outliers.store.captures` and `outliers.store.verify` find.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from flows.cli.console import line, size
from flows.cli.options import add_common_options, add_plain_option

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.events.event import Level
    from outliers.store.captures import Held
    from outliers.store.verify import Verification
    from outliers.workspace import Workspace

SHOWN = 10
"""Damages and foreign files that are listed; of the rest only the number. `--json` has them all."""


def add_captures_parser(verbs: Any, text: str) -> None:
    """Add `captures list` and `captures rm ID...`."""
    captures = verbs.add_parser("captures", help=text)
    actions = captures.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, does in (("list", "what is held, and how much of the disk"), ("rm", "remove captures by their ids")):
        sub = actions.add_parser(action, help=does, description=does)
        if action == "rm":
            sub.add_argument("capture_id", nargs="+", help="as `outliers captures list` shows them")
        sub.add_argument("--host", metavar="NAME", help="on this host of provider ssh, not here")
        add_common_options(sub)
        if action == "list":
            add_plain_option(sub)


def add_verify_parser(verbs: Any, text: str) -> None:
    """Add `verify CAPTURE`."""
    check = verbs.add_parser(
        "verify",
        help=text,
        description=f"{text}. Exit codes: 0 sound, 1 damaged, 2 there is no such capture.",
    )
    check.add_argument("capture", metavar="CAPTURE", help="its id, as `outliers captures list` shows it, or its folder")
    check.add_argument(
        "--repair", action="store_true", help="mark what is damaged, so that the same study computes that alone again"
    )
    add_common_options(check)


def list_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers captures list`."""
    from rich.table import Table
    from rich.text import Text

    from outliers.publish.own import names_of_captures
    from outliers.spec import public_name
    from outliers.untrusted.visible import visible

    where = arguments.host or str(workspace.root)
    held: list[tuple[Held, str | None]] = (
        [(item, None) for item in _list_on_host(workspace, arguments.host)] if arguments.host else _list_here(workspace)
    )
    if arguments.json:
        print(json.dumps({"captures": [item.model_dump() | {"part": part} for item, part in held]}))
        return
    names = {} if arguments.host else names_of_captures(workspace)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("capture", "model", "sequences", "size"):
        table.add_column(name)
    for item, part in held:
        name = item.capture_id if part is None else f"{item.capture_id} part {part}"
        also = f", {item.counted} counted and freed" if item.counted else ""
        if item.of_layer_batches:
            also += f"; by layers {item.layer_batches * 100 // item.of_layer_batches}%"
        model = names.get(item.capture_id, public_name(item.model))
        table.add_row(name, Text(visible(model)), f"{item.done} of {item.of_sequences}{also}", size(item.bytes))
    if held:
        Answers(arguments).table(table)
    else:
        console.print(f"no captures {'on' if arguments.host else 'in'} {where}", soft_wrap=True)


def _list_here(workspace: Workspace) -> list[tuple[Held, str | None]]:
    """The captures of a workspace, and those of the parts that ran here, each with its part."""
    from outliers.store.captures import list_captures
    from outliers.study.parts import captures_of_shards

    held: list[tuple[Held, str | None]] = [(item, None) for item in list_captures(workspace)]
    for part, own in captures_of_shards(workspace):
        held += [(item, part) for item in list_captures(own)]
    return sorted(held, key=lambda found: (found[0].capture_id, found[1] or ""))


def _list_on_host(workspace: Workspace, name: str) -> tuple[Held, ...]:
    """The captures of every machine that was held on a host."""
    from outliers.machines.ssh import ask_host
    from outliers.store.captures import Held

    return tuple(Held.model_validate(item) for item in ask_host(workspace.root, name, "captures")["captures"])


def remove_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> None:
    """`outliers captures rm`."""
    if arguments.host:
        from outliers.machines.ssh import ask_host

        freed = ask_host(workspace.root, arguments.host, "remove_captures", names=arguments.capture_id)["removed"]
    else:
        freed = {name: _remove_here(workspace, name) for name in arguments.capture_id}
    if arguments.json:
        print(json.dumps({"removed": freed}))
        return
    for name, held in freed.items():
        Answers().print(f"removed {name}, {size(held)}")
    if arguments.host:
        return
    Answers().print(f"{size(shutil.disk_usage(workspace.root).free)} free")


def _remove_here(workspace: Workspace, capture_id: str) -> int:
    """Remove a capture, and what parts of it lie here; the bytes that this frees. Raises as `remove_capture`."""
    from outliers.store.captures import remove_capture
    from outliers.study.parts import captures_of_shards

    parts = captures_of_shards(workspace, capture_id)
    # of a study that was spread and not joined yet there are parts alone
    alone = parts and not workspace.capture(capture_id).is_dir()
    freed = 0 if alone else remove_capture(workspace, capture_id)
    return freed + sum(remove_capture(own, capture_id) for _, own in parts)


def verify_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    """`outliers verify`; whether the capture is sound. Raises BadInput where there is none, Busy."""
    from flows.cli.console import Steps
    from outliers.store.captures import find_capture
    from outliers.store.verify import verify

    folder = find_capture(workspace, arguments.capture)
    steps = Steps(console)
    with steps.shown():
        found = verify(folder, Bars(steps), repair=arguments.repair)
    if arguments.json:
        print(json.dumps(found.model_dump() | {"sound": found.sound}))
    else:
        _show(Answers(), found, model_of_capture(workspace, found))
    return found.sound


class Bars:
    """A Reporter whose progress is shown at this terminal."""

    def __init__(self, steps: Any) -> None:
        self._steps = steps

    def log(self, level: Level, message: str) -> None:
        from outliers.events.event import Event

        self._steps.listen("verify", Event(time.time(), "log", level=level, message=message))

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        from outliers.events.event import Event

        self._steps.listen(step, Event(time.time(), "progress", step=step, done=done, total=total, unit=unit))


def model_of_capture(workspace: Workspace, found: Verification) -> str:
    """What the model of a capture is called here."""
    from outliers.publish.own import names_of_captures
    from outliers.spec import public_name

    return names_of_captures(workspace).get(found.capture_id, public_name(found.model))


def _show(console: Console, found: Verification, model: str) -> None:
    line(console, "capture", f"{found.capture_id}, {model}")
    rate = f", {size(int(found.bytes / found.seconds))} a second" if found.seconds > 0.01 else ""
    line(console, "checked", f"{found.chunks:,} chunks, {size(found.bytes)} in {found.seconds:.1f} s{rate}")
    line(console, "sequences", f"{found.done} of {found.of_sequences} are done and sound")
    if found.counted:
        line(console, "counted", f"{found.counted} more were counted and freed: their counts are in the summary")
    if found.unfinished:
        line(console, "unfinished", f"{found.unfinished} chunks of sequences that are not done: they are never read")
    for name, items in (("foreign", found.foreign), ("damaged", found.damage)):
        for item in items[:SHOWN]:
            line(console, name, str(item), style="red" if name == "damaged" else "")
        if len(items) > SHOWN:
            line(console, name, f"and {len(items) - SHOWN} more (--json names them all)")
    console.print()
    console.print("every checksum is right" if found.sound else found.remedy(), soft_wrap=True, highlight=False)
