"""What a host has, found out with nothing but its POSIX shell: before anything is installed or sent there.

One script over standard input, lines of `name=value` back.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from outliers.errors import DeployFailed, HostRefused
from outliers.hardware import OLD_QUERY, QUERY, Facts, Gpu, parse_gpus
from outliers.machines.connection import Connection
from outliers.untrusted.bounds import NAME_CHARS, PATH_CHARS
from outliers.untrusted.visible import cut, visible, visible_line

OLDEST_PYTHON = (3, 11)
PROBE_SECONDS = 60.0
PROBE_BYTES = 1 << 20
"""A host with many GPUs says 4 KB, behind the greeting of its login shell."""
_SHOWN_CHARS = 2000
_MOST_PYTHONS, _MOST_GPUS = 64, 1024
_MARK = re.compile("@(?:ROOT|QUERY|OLD_QUERY|NAMES)@")
_DIGITS = re.compile("[0-9]{1,15}")
_PYTHON = re.compile(r"([0-9]{1,4}(?:\.[0-9]{1,6}){1,3})\|([^|]+)\|([\w.+!-]{0,64})\|(True|False)", re.ASCII)
_NAMES = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python")

# A limit of the container is looked for as hardware.total_ram_bytes does; a login shell's own greetings come before "begin".
_SCRIPT = r"""
echo; echo begin
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
printf 'root=%s\n' "$root"
place=$root
while [ ! -d "$place" ]; do place=$(dirname "$place"); done
[ -w "$place" ] && echo writable=yes
df -Pk "$place" | sed -n '2s/.* \([0-9][0-9]*\)  *[0-9]*% .*/disk_kb=\1/p'
printf 'visible=%s\n' "${CUDA_VISIBLE_DEVICES-all}"
if command -v nvidia-smi >/dev/null 2>&1; then
  { timeout -k 5 20 nvidia-smi @QUERY@ || { [ $? -ge 124 ] || timeout -k 5 20 nvidia-smi @OLD_QUERY@; }; } | sed 's/^/gpu=/'
fi
for name in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
  if command -v "$name" >/dev/null 2>&1; then printf 'uv=%s\n' "$(command -v "$name")"; break; fi
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

    Raises HostRefused where it is not Linux or can't be written to, DeployFailed for an answer that can't be read, MachineLost.
    """
    names = [python] if python else _NAMES
    words = {
        "@ROOT@": shlex.quote(root),
        "@QUERY@": shlex.join(QUERY),
        "@OLD_QUERY@": shlex.join(OLD_QUERY),
        "@NAMES@": " ".join(map(shlex.quote, names)),
    }
    # all at once: a folder may be called as one of these marks is
    script = _MARK.sub(lambda mark: words[mark[0]], _SCRIPT)
    done = connection.call("sh -s", script.encode(), PROBE_SECONDS, PROBE_BYTES)
    text = done.stdout.decode(errors="replace")
    _, begun, said = text.partition("\nbegin\n")
    if not begun or not said.rstrip().endswith("end"):
        last = cut(done.stderr.strip() or visible(text).strip() or "no output", _SHOWN_CHARS)
        raise DeployFailed(f"{connection.destination} has no POSIX shell that answers: {last}")
    found: dict[str, list[str]] = {}
    # line feeds alone: some other characters end a line for `splitlines`
    for line in said.split("\n"):
        name, _, value = line.partition("=")
        found.setdefault(name, []).append(value)
    try:
        return _read(connection.destination, found)
    except (ValueError, LookupError) as error:
        raise DeployFailed(
            f"{connection.destination} says of itself what can't be: {visible_line(str(error))}; its shell or a program there "
            "answers for another"
        ) from error


def _read(name: str, found: dict[str, list[str]]) -> Probe:
    """The probe in what a host printed; ValueError where it can't be. HostRefused as `probe`."""
    system, root = visible_line(_one(found, "system"), NAME_CHARS), _path(_one(found, "root"))
    if not system.startswith("Linux"):
        raise HostRefused(f"{name} runs {system}: a machine for studies runs Linux")
    if "writable" not in found or "disk_kb" not in found:  # root may write to /proc, which is not a disk
        raise HostRefused(
            f"{root} can't be made on {name}: name another folder (outliers machines add ... --folder DIR)"
        )
    asked = (_python(text) for text in found.get("python", [])[:_MOST_PYTHONS])
    pythons = sorted((one for one in asked if one is not None), key=lambda one: (not one.torch, one.version))
    fitting = tuple(one for one in pythons if one.version >= OLDEST_PYTHON)
    # "max" is not a number: no limit at this level
    limits = [_number("limit", text) for text in found.get("limit", []) if text.isdigit()]
    total = min([_number("ram_kb", _one(found, "ram_kb")) * 1024, *limits])
    visible_gpus = _one(found, "visible")
    facts = Facts(
        cpus=max(1, _number("cpus", _one(found, "cpus"))),
        ram_bytes=total,
        ram_available_bytes=min(total, _number("available_kb", _one(found, "available_kb")) * 1024),
        disk_free_bytes=_number("disk_kb", _one(found, "disk_kb")) * 1024,
        gpus=_gpus(found.get("gpu", []), None if visible_gpus == "all" else visible_gpus),
        python=".".join(map(str, fitting[0].version)) if fitting else "",
    )
    uv = found.get("uv", [""])[0]
    return Probe(facts, system, root, fitting, _path(uv) if uv.startswith("/") else "")


def _one(found: dict[str, list[str]], name: str) -> str:
    if name not in found:
        raise ValueError(f"it does not say its '{name}'")
    return found[name][0]


def _number(name: str, text: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise ValueError(f"'{name}' is '{text[:40]}', and not a number of at most 15 digits")
    return int(text)


def _path(text: str) -> str:
    if not text.startswith("/") or text != visible_line(text, PATH_CHARS):
        raise ValueError(f"'{text[:80]}' is not the full path of a file")
    return text


def _gpus(lines: list[str], shown: str | None) -> tuple[Gpu, ...]:
    if len(lines) > _MOST_GPUS:
        raise ValueError(f"it has more than {_MOST_GPUS} GPUs")
    gpus = parse_gpus("\n".join(text for text in lines if len(text) < PATH_CHARS), shown)
    return tuple(replace(gpu, name=visible_line(gpu.name, NAME_CHARS)) for gpu in gpus)


def _python(text: str) -> Python | None:
    """The interpreter that a line describes; None where it can't be used."""
    found = _PYTHON.fullmatch(text)
    if found is None:
        return None
    version, path, torch, venv = found.groups()
    return Python(tuple(int(part) for part in version.split(".")), _path(path), torch, venv == "True")
