"""`python -m outliers.machines.check REQUIREMENT...`: exits with 1 and names those that this interpreter doesn't meet.

Asked of a Python that a user names for a host, before anything is run with it.
"""

from __future__ import annotations

import importlib.metadata
import sys


def unmet(lines: list[str]) -> list[str]:
    """Which of these requirements are not met, each with the version that is there."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging", *lines]
    found = []
    for requirement in map(Requirement, lines):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(str(requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement} (it has {version})")
    return found


if __name__ == "__main__":
    absent = unmet(sys.argv[1:])
    if absent:
        sys.exit(", ".join(absent))
