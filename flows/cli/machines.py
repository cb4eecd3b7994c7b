"""`outliers machines add|hosts|remove|list|release|reap`: machines that are held or rented, until when, at what price.

Works without Prefect, so that it can end a machine whatever happened to the run that rented it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from outliers.errors import BadInput, OutliersError
from outliers.hardware import GB
from outliers.machines.base import Rental
from outliers.machines.providers import provider
from outliers.machines.reap import REMOTE, reap
from outliers.machines.rentals import Rentals
from outliers.names import nearest

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.machines.probe import Probe
    from outliers.machines.ssh import Host
    from outliers.workspace import Workspace

_ASKING = "asking what is held or rented (SkyPilot takes seconds to start)"

_EXAMPLES = """examples:
  outliers machines add lab1 anna@gpu1.lab.example --folder /scratch/anna/outliers
  outliers machines list
  outliers machines release outliers-5f0c2a9d1b7e3c46
  outliers machines release --all
  outliers machines reap
"""


def add_machines_parser(verbs: Any, text: str) -> None:
    """Add `machines` and its actions."""
    machines = verbs.add_parser(
        "machines",
        help=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from flows.cli.options import add_common_options, add_plain_option

    actions = machines.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "add": "name a host of yours for --provider ssh, and see what it has",
        "hosts": "the hosts that were added",
        "remove": "forget a host that was added",
        "list": "list machines that are held or rented: name, provider, state, price, spent so far, lease left, study",
        "release": "end machines, even if others hold them; one that is gone already is not an error, an unknown name is",
        "reap": "end every machine whose lease is over; the deployment `reap` does this on a schedule",
    }
    made = {name: actions.add_parser(name, help=does, description=does) for name, does in texts.items()}
    add = made["add"]
    add.add_argument("name", metavar="NAME", help="what it is called from now on, such as lab1")
    add.add_argument("destination", metavar="DESTINATION", help="user@host, or a name of your ssh configuration")
    add.add_argument(
        "--folder",
        default=".outliers",
        metavar="DIR",
        help="where our files go on that host: gigabytes (default: .outliers in its home folder)",
    )
    add.add_argument(
        "--python",
        default="",
        metavar="PATH",
        help="an interpreter there that has all that is needed, used as it is (default: an environment is made)",
    )
    add.add_argument(
        "--price", type=float, default=0.0, metavar="X", help="what the host costs you, in dollars an hour (default: 0)"
    )
    made["remove"].add_argument("name", metavar="NAME", help="as `outliers machines hosts` shows it")
    made["release"].add_argument("name", nargs="*", metavar="NAME", help="as `outliers machines list` shows it")
    made["release"].add_argument("--all", action="store_true", help="all of them")
    for sub in made.values():
        add_common_options(sub)
    for name in ("hosts", "list"):
        add_plain_option(made[name])


def machines_command(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    """`outliers machines ACTION`; whether all of it worked."""
    action = {
        "add": _add,
        "hosts": _hosts,
        "remove": _remove,
        "list": _list,
        "release": _release,
        "reap": _reap,
    }[arguments.action]
    return action(workspace, arguments, console)


def warn_of_overdue(workspace: Workspace, console: Console) -> None:
    """Say at the start of any command which machines are past their lease, by the records on this side."""
    now = time.time()
    over = [rental for rental in Rentals(workspace.root).all() if rental.is_over(now)]
    if over:
        names = ", ".join(f"{rental.name} ({rental.provider}, {rental.place})" for rental in over)
        console.print(
            f"past its lease: {names}; `outliers machines reap` makes sure that it has ended",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )


def _add(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    from flows.cli.console import busy
    from outliers.machines.ssh import Host, Hosts, access

    if not 0 <= arguments.price < math.inf:
        raise BadInput(f"--price {arguments.price:g}: dollars an hour, 0 or more")
    host = Host(arguments.name, arguments.destination, arguments.folder, arguments.python, arguments.price)
    Hosts(workspace.root).check(host)
    _refuse_to_move(workspace, host)
    with busy(console, f"asking {host.destination} what it has"):
        found = access(host).probe()
    Hosts(workspace.root).add(host)
    if arguments.json:
        print(json.dumps(_host_record(host) | {"facts": _facts_record(found)}))
        return True
    Answers().print(f"{host.name}: {describe(found)}")
    if not found.pythons and not found.uv:
        console.print(
            "it has no Python 3.11 or newer and no uv: install one of them there before a study", style="yellow"
        )
    Answers().print(f"  outliers study --provider ssh --host {host.name} --model ...")
    return True


def _refuse_to_move(workspace: Workspace, host: Host) -> None:
    """BadInput where a host that is held would become another: what runs on the old one could not be ended any more."""
    from outliers.machines.ssh import Host, Hosts

    was = Hosts(workspace.root).get(host.name) or Host(host.name, host.name)
    if (was.destination, was.folder, was.python) != (host.destination, host.folder, host.python):
        _refuse_if_held(workspace, host.name)


def _refuse_if_held(workspace: Workspace, host: str) -> None:
    held = [rental.name for rental in Rentals(workspace.root).all("ssh") if rental.place == host]
    if held:
        raise BadInput(f"{host} is held by {', '.join(held)}: release it first (outliers machines release)")


def describe(found: Probe) -> str:
    """One line of what a host has."""
    facts = found.facts
    gpus = ", ".join(f"{gpu.name} ({gpu.total_bytes / GB:.0f} GB)" for gpu in facts.gpus) or "no GPU"
    python = f"Python {facts.python}" if facts.python else "no Python that is new enough"
    torch = next((f" with torch {one.torch}" for one in found.pythons[:1] if one.torch), "")
    return (
        f"{gpus}, {facts.cpus} cores, {facts.ram_bytes / GB:.0f} GB of memory, {facts.disk_free_bytes / GB:.0f} GB of disk "
        f"free, {python}{torch}"
    )


def _hosts(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    from rich.table import Table

    from outliers.machines.ssh import Hosts

    hosts = Hosts(workspace.root).all()
    if arguments.json:
        print(json.dumps({"hosts": [_host_record(host) for host in hosts]}))
    elif not hosts:
        console.print("no host was added: outliers machines add NAME user@host")
    else:
        table = Table("name", "host", "folder", "python", "$/h", box=None, pad_edge=False)
        for host in hosts:
            table.add_row(host.name, host.destination, host.folder, host.python or "made", f"{host.price_per_hour:.2f}")
        Answers(arguments).table(table)
    return True


def _remove(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    from outliers.machines.ssh import Hosts

    hosts = Hosts(workspace.root)
    _refuse_if_held(workspace, arguments.name)
    if not hosts.remove(arguments.name):
        known = [host.name for host in hosts.all()]
        meant = nearest(arguments.name, known)
        raise BadInput(f"no host '{arguments.name}' was added{meant}; added: {', '.join(known) or 'none'}")
    if arguments.json:
        print(json.dumps({"removed": arguments.name}))
    return True


def _list(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    from rich.table import Table

    from flows.cli.console import busy

    with busy(console, _ASKING):
        rentals, silent = _rentals(workspace)
    now = time.time()
    if arguments.json:
        print(json.dumps({"machines": [_rental_record(rental, now) for rental in rentals], "silent": silent}))
        return True
    if not rentals:
        console.print("nothing is held or rented")
    else:
        table = Table(
            "name", "provider", "where", "state", "$/h", "spent", "lease left", "study", box=None, pad_edge=False
        )
        for rental in rentals:
            over = rental.is_over(now)
            table.add_row(
                rental.name,
                rental.provider,
                rental.place,
                rental.state,
                f"{rental.price_per_hour:.2f}",
                f"${rental.spent(now):.2f}",
                "over" if over else _duration(rental.lease_until - now) if rental.holders else "ends by itself",
                ", ".join(sorted({holder.title for holder in rental.holders.values() if holder.title})),
                style="red" if over else None,
            )
        Answers(arguments).table(table)
    for text in silent:
        console.print(text, style="yellow", soft_wrap=True)
    return True


def _rentals(workspace: Workspace) -> tuple[list[Rental], list[str]]:
    """What each provider that was used says is there; of one that is silent, the records."""
    found: list[Rental] = []
    silent = list(Rentals(workspace.root).unreadable())
    for name in REMOTE:
        if not Rentals(workspace.root).ever(name):
            continue  # asking a provider that was never used takes seconds
        try:
            found += provider(name, workspace.root).list()
        except OutliersError as error:
            found += Rentals(workspace.root).all(name)
            silent.append(f"{name} did not answer, these are the records on this side: {error}")
    return found, silent


def _release(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    from flows.cli.console import busy

    if bool(arguments.name) == arguments.all:
        raise BadInput("name the machines to release (outliers machines list shows them), or --all")
    with busy(console, _ASKING):
        rentals, silent = _rentals(workspace)
    known = {rental.name: rental for rental in rentals}
    names = sorted(known) if arguments.all else list(dict.fromkeys(arguments.name))
    if not silent:
        _refuse_unknown(workspace, names, sorted(known))
    done: list[str] = []
    # whatever could not be looked at may be what was meant
    failed = silent if not set(names) <= known.keys() or arguments.all else []
    for name in names:
        try:
            with busy(console, f"releasing {name}"):
                done.append(_release_one(workspace, known.get(name), name))
        except OutliersError as error:
            failed.append(f"{name} could not be released: {error}")
    return _told(arguments, console, done, failed)


def _refuse_unknown(workspace: Workspace, names: list[str], known: list[str]) -> None:
    """BadInput, before anything is released, for a name that no machine has or ever had: what was meant may still cost."""
    records = Rentals(workspace.root)
    strange = [
        name
        for name in names
        if name not in known and not records.was_held(name) and not _is_elsewhere(workspace, name)
    ]
    if strange:
        meant = "".join(nearest(name, known) for name in strange[:1])
        raise BadInput(
            f"no machine {', '.join(map(repr, strange))} is held or rented, or ever was{meant}; held or rented: "
            f"{', '.join(known) or 'none'}. Nothing was released (outliers machines list shows more)"
        )


def _is_elsewhere(workspace: Workspace, name: str) -> bool:
    """Whether a machine was rented from another workspace, or may have been: SkyPilot does not answer."""
    from outliers.machines.sky import NAME, SkyProvider, may_have

    if not may_have(name):
        return False
    source = provider(NAME, workspace.root)
    try:
        return not isinstance(source, SkyProvider) or source.has(name)
    except OutliersError:
        return True  # its release says why


def _release_one(workspace: Workspace, known: Rental | None, name: str) -> str:
    """Releases a machine; one that is in no list of this workspace's, where its name says that it may have been rented from
    another one."""
    if known is not None:
        return provider(known.provider, workspace.root).release(name)
    from outliers.machines.sky import NAME, may_have

    if may_have(name):
        return provider(NAME, workspace.root).release(name)
    return f"{name} is not held: there is nothing to release"


def _reap(workspace: Workspace, arguments: argparse.Namespace, console: Console) -> bool:
    from flows.cli.console import busy

    with busy(console, "ending machines that are past their lease"):
        done, failed = reap(workspace)
    return _told(arguments, console, done, failed)


def _told(arguments: argparse.Namespace, console: Console, done: list[str], failed: list[str]) -> bool:
    if arguments.json:
        print(json.dumps({"done": done, "failed": failed}))
        return not failed
    for text in done or ([] if failed else ["there was nothing to do"]):
        Answers().print(text)
    for text in failed:
        console.print(text, style="red", highlight=False, soft_wrap=True)
    return not failed


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{max(1, minutes)} min"


def _host_record(host: Host) -> dict[str, Any]:
    return {
        "name": host.name,
        "destination": host.destination,
        "folder": host.folder,
        "python": host.python or None,
        "price_per_hour": host.price_per_hour,
    }


def _facts_record(found: Probe) -> dict[str, Any]:
    facts = found.facts
    return {
        "cpus": facts.cpus,
        "ram_bytes": facts.ram_bytes,
        "disk_free_bytes": facts.disk_free_bytes,
        "gpus": [{"name": gpu.name, "total_bytes": gpu.total_bytes} for gpu in facts.gpus],
        "python": facts.python or None,
    }


def _rental_record(rental: Rental, now: float) -> dict[str, Any]:
    return {
        "name": rental.name,
        "provider": rental.provider,
        "place": rental.place,
        "state": rental.state,
        "price_per_hour": rental.price_per_hour,
        "spent": round(rental.spent(now), 4),
        "lease_seconds_left": round(max(0.0, rental.lease_until - now)) if rental.lease_until != math.inf else None,
        "studies": sorted({holder.title for holder in rental.holders.values() if holder.title}),
    }
