"""The command `outliers`: one file a verb, and what they share.

`main` is the console script. It imports the rest when it runs, so that one verb's module is importable without the others.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv`, or with the arguments of this process; returns the exit code."""
    from flows.cli.command import main as run

    return run(argv)
