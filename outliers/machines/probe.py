"""What a host has, found out with nothing but its POSIX shell: before anything is installed or sent there.

One script over standard input, lines of `name=value` back. Before it: `connection`. After it: `base.fits`, which refuses,
and `deploy`, which needs a Python or uv.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from outliers.errors import DeployFailed, HostRefused
from outliers.machines.base import Facts
from outliers.machines.connection import Connection
from outliers.machines.local import OLD_QUERY, QUERY, parse_gpus

OLDEST_PYTHON = (3, 11)
PROBE_SECONDS = 60.0
_NAMES = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python")

# A limit of the container is looked for as jobs.total_ram_bytes does; a login shell's own greetings come before "begin".
_SCRIPT = r"""
echo; echo begin
echo "home=$HOME"
echo "system=$(uname -s) $(uname -m)"
echo "cpus=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1)"
sed -n 's/^MemTotal: *\([0-9]*\).*/ram_kb=\1/p; s/^MemAvailable: *\([0-9]*\).*/available_kb=\1/p' /proc/meminfo
group=$(sed -n 's/^0:://p' /proc/self/cgroup 2>/dev/null)
while :; do
  limit=$(cat "/sys/fs/cgroup$group/memory.max" 2>/dev/null) && echo "limit=$limit"
  case "$group" in ""|/) break;; esac
  group=${group%/*}
done
root=@ROOT@
case "$root" in /*) ;; *) root="$HOME/$root";; esac
echo "root=$root"
place=$root
while [ ! -d "$place" ]; do place=$(dirname "$place"); done
[ -w "$place" ] && echo "writable=$place"
df -Pk "$place" | sed -n '2s/.* \([0-9][0-9]*\)  *[0-9]*% .*/disk_kb=\1/p'
echo "visible=${CUDA_VISIBLE_DEVICES-all}"
if command -v nvidia-smi >/dev/null 2>&1; then
  { timeout -k 5 20 nvidia-smi @QUERY@ || { [ $? -ge 124 ] || timeout -k 5 20 nvidia-smi @OLD_QUERY@; }; } | sed 's/^/gpu=/'
fi
for name in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
  if command -v "$name" >/dev/null 2>&1; then echo "uv=$(command -v "$name")"; break; fi
done
for name in @NAMES@; do
  path=$(command -v "$name" 2>/dev/null) || continue
  "$path" -c 'import sys, importlib.metadata as m, importlib.util as u
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return ""
venv = bool(u.find_spec("venv") and u.find_spec("ensurepip"))
print("python=%d.%d.%d|%s|%s|%s" % (*sys.version_info[:3], sys.executable, version("torch"), venv))' 2>/dev/null
done
echo end
"""


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter of the host; `torch`: the version that comes with it, "" for none; `venv`: can make environments."""

    version: tuple[int, ...]
    path: str
    torch: str
    venv: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """What a host has. `root`: where our files go, in full; `pythons`: those that are new enough, best first."""

    facts: Facts
    system: str
    root: str
    pythons: tuple[Python, ...]
    uv: str


def probe(connection: Connection, root: str, python: str | None = None) -> Probe:
    """Ask a host. `root` may be relative to the home folder there; `python`: an interpreter of the user's choice.

    Raises HostRefused for what is no Linux or can't be written, DeployFailed for an answer that is none, MachineLost.
    """
    names = [python] if python else _NAMES
    script = (
        _SCRIPT.replace("@ROOT@", shlex.quote(root))
        .replace("@QUERY@", shlex.join(QUERY))
        .replace("@OLD_QUERY@", shlex.join(OLD_QUERY))
        .replace("@NAMES@", " ".join(map(shlex.quote, names)))
    )
    done = connection.call("sh -s", script.encode(), PROBE_SECONDS)
    text = done.stdout.decode(errors="replace")
    _, begun, said = text.partition("\nbegin\n")
    if not begun or not said.rstrip().endswith("end"):
        raise DeployFailed(
            f"{connection.destination} has no POSIX shell that answers: {done.stderr.strip() or text.strip() or 'no output'}"
        )
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        name, _, value = line.partition("=")
        found.setdefault(name, []).append(value)
    return _read(connection.destination, found)


def _read(name: str, found: dict[str, list[str]]) -> Probe:
    system, root = found["system"][0], found["root"][0]
    if not system.startswith("Linux"):
        raise HostRefused(f"{name} runs {system}: a machine for studies runs Linux")
    if "writable" not in found or "disk_kb" not in found:  # /proc lets root write and is no disk
        raise HostRefused(
            f"{root} can't be made on {name}: name another folder (outliers machines add ... --folder DIR)"
        )
    pythons = sorted((_python(text) for text in found.get("python", [])), key=lambda one: (not one.torch, one.version))
    fitting = tuple(one for one in pythons if one.version >= OLDEST_PYTHON)
    total = min([int(found["ram_kb"][0]) * 1024, *(int(text) for text in found.get("limit", []) if text.isdigit())])
    visible = found["visible"][0]
    facts = Facts(
        cpus=int(found["cpus"][0]),
        ram_bytes=total,
        ram_available_bytes=min(total, int(found["available_kb"][0]) * 1024),
        disk_free_bytes=int(found["disk_kb"][0]) * 1024,
        gpus=parse_gpus("\n".join(found.get("gpu", [])), None if visible == "all" else visible),
        python=".".join(map(str, fitting[0].version)) if fitting else "",
    )
    return Probe(facts, system, root, fitting, found.get("uv", [""])[0])


def _python(text: str) -> Python:
    version, path, torch, venv = text.split("|")
    return Python(tuple(int(part) for part in re.findall(r"\d+", version)), path, torch, venv == "True")
