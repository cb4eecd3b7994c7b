"""What deploying to a host costs: the first time, the second time, and with a changed wheel.

    python -m benchmarks.deploy                     an sshd of its own on loopback, environments in a temporary folder
    python -m benchmarks.deploy --host lab1         a host as `ssh` knows it, in a folder that is removed afterwards

Each time is of everything: connecting anew, looking at what the host has, sending, installing, the first answer of the
program there. On loopback no network is measured, and uv takes what its cache already has: the first time is then the
time of linking, not of downloading.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from outliers.machines.connection import Connection
from outliers.machines.deploy import deploy
from outliers.machines.probe import probe
from outliers.machines.wheel import Wheel, build_wheel

FOLDER = ".outliers-benchmark"
KEPT = ("SSL_CERT_FILE", "PIP_FIND_LINKS", "PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX")


def once(destination: str, wheel: Wheel) -> tuple[float, int, str]:
    """One deployment over a connection of its own: seconds, bytes sent, what was installed."""
    connection = Connection(destination)
    connection.close()
    began = time.perf_counter()
    made = deploy(connection, probe(connection, FOLDER), wheel=wheel)
    answer = connection.call(" ".join([*made.python, "-m", "outliers.machines.agent", "/tmp", "held"]))
    seconds = time.perf_counter() - began
    if answer.returncode:
        sys.exit(f"the program does not answer there: {answer.stderr}")
    connection.close()
    return seconds, connection.sent, made.how


def run(destination: str, rounds: int) -> None:
    """Measure and print a table."""
    wheel = build_wheel()
    print(f"wheel: {len(wheel.data):,} bytes; {rounds} rounds, median (least to most)\n")
    first = once(destination, wheel)
    print(f"{'first time':<16} {first[0]:7.2f} s                    {first[1]:>10,} bytes sent   {first[2]}")
    variants: dict[str, Callable[[int], Wheel]] = {
        "second time": lambda number: wheel,
        "changed wheel": lambda number: build_wheel({"outliers/_changed.py": f"NUMBER = {number}\n".encode()}),
    }
    for name, make in variants.items():
        times, sent, how = [], 0, ""
        for number in range(rounds):
            seconds, sent, how = once(destination, make(number))
            times.append(seconds)
        spread = f"({min(times):.2f} to {max(times):.2f})"
        print(f"{name:<16} {statistics.median(times):7.2f} s {spread:<18} {sent:>10,} bytes sent   {how}")
    Connection(destination).call(f"rm -rf {FOLDER}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="as `ssh` knows it (default: an sshd of its own on loopback)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.host:
        run(arguments.host, arguments.rounds)
        return
    from tests.support.remote import Sshd

    with tempfile.TemporaryDirectory() as folder:
        known = {name: os.environ[name] for name in KEPT if name in os.environ}
        cache = os.environ.get("UV_CACHE_DIR") or str(Path.home() / ".cache" / "uv")
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        with Sshd(Path(folder), "loopback", path=path, environment=known | {"UV_CACHE_DIR": cache}) as host:
            os.environ["OUTLIERS_SSH_CONFIG"] = str(host.config)
            run("loopback", arguments.rounds)


if __name__ == "__main__":
    main()
