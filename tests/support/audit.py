"""Both lists of versions against the public advisory databases, by pip-audit: `make audit`. Exits with 0, 1 (advisories) or 2
(unknown).

pip-audit reports a package that no database knows as skipped, and ends with 0: where none can be reached, it would look as if all
were well. So its answer is read: what was not looked up is counted and said. Standard library alone. Before it: the Makefile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LISTS = ("constraints.txt", "constraints-latest.txt")
SERVICES = ("pypi", "osv")
"""Asked in this order, until one knows most of the packages."""
LEAST = 0.9
"""Share of the packages that a database must know for its answer to count."""


def main(command: list[str]) -> int:
    """The worst exit code of the lists. `command`: pip-audit's argv, which the audited list is added to."""
    return max([audit(name, command) for name in LISTS])


def audit(name: str, command: list[str]) -> int:
    """The exit code of one list; what was found is printed."""
    print(f"{name}:")
    lines = Path(name).read_text("utf-8").splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    with tempfile.TemporaryDirectory() as place:
        listing = Path(place) / "requirements.txt"
        listing.write_text("\n".join(wanted) + "\n", "utf-8")
        for service in SERVICES:
            found, trouble = ask([*command, "--vulnerability-service", service, "--requirement", str(listing)])
            known = [one for one in found if "skip_reason" not in one]
            if len(known) >= LEAST * len(wanted):
                return report(known, len(wanted), service)
            print(f"{service}: {len(known)} of {len(wanted)} packages could be looked up{trouble}")
    print(f"{name} is NOT audited: no advisory database could be reached from here. Run `make audit` where one can be")
    return 2


def ask(command: list[str]) -> tuple[list[dict], str]:
    """The packages of pip-audit's answer, none where it gave no answer; its last words in that case."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=600)
    try:
        return list(json.loads(done.stdout)["dependencies"]), ""
    except (ValueError, KeyError, TypeError):
        last = " ".join(done.stderr.split())[-200:]
        return [], f" ({last or f'pip-audit ended with {done.returncode}'})"


def report(known: list[dict], wanted: int, service: str) -> int:
    """Print every advisory; the exit code."""
    worst = [(one["name"], one["version"], each) for one in known for each in one.get("vulns", [])]
    for name, version, each in worst:
        fixed = ", ".join(each.get("fix_versions", [])) or "no version yet"
        print(
            f"{name} {version}: {each['id']}, mended in {fixed}. {' '.join(each.get('description', '').split())[:200]}"
        )
    print(f"{service}: {len(known)} of {wanted} packages were looked up, {len(worst)} advisories")
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
