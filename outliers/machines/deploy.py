"""This program on a host: one wheel, named by its hash, and an environment that is reused.

    <root>/deploy/code/<wheel>/       the wheel, unpacked: jobs of another version keep running from theirs
    <root>/deploy/venvs/<key>/        what it needs, made once for a set of requirements, constraints and a Python
    <root>/deploy/own-<key>.ready     a Python of the user's own was found to have all that is needed
    <root>/deploy/lock                held during an installation

A host that has both is ready after one round trip; a changed wheel is unpacked in a second; an environment is made by uv,
under the same constraints as this side's. A torch that the host's own Python brings is used and not downloaded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from outliers.errors import DeployFailed, JobFailed
from outliers.machines.connection import Connection
from outliers.machines.probe import OLDEST_PYTHON, Probe, Python
from outliers.machines.wheel import Wheel, build_wheel, constraints, requirements, without_torch
from outliers.untrusted.bounds import INSTALLER_LINES
from outliers.untrusted.visible import cut, last_drawn, visible

UPLOAD_SECONDS = 300.0
INSTALL_SECONDS = 3600.0
SILENCE_SECONDS = 900.0
"""A torch of several gigabytes may be unpacked without a word for minutes."""

_LINE_CHARS = 2000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deployment:
    """`python`: how a command line of this program begins there. `how`: ready, wheel or environment: what was installed."""

    python: tuple[str, ...]
    wheel: str
    seconds: float
    how: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where things go: `code`, and the environment `venv`, or None where the host's own Python is used as it is.

    `packages`: the file that says that `venv` is whole, or that the host's own Python was found to have all.
    """

    wheel: Wheel
    code: str
    venv: str | None
    packages: str
    python: Python | None
    requirements: str
    constraints: str

    @property
    def interpreter(self) -> str:
        if self.venv is None and self.python is not None:
            return self.python.path
        return f"{self.venv}/bin/python"


def deploy(connection: Connection, found: Probe, own_python: bool = False, wheel: Wheel | None = None) -> Deployment:
    """Install what is missing and say how to run it. `own_python`: use the (one) Python of the probe as it is. `wheel`:
    another than that of what runs here.

    Raises DeployFailed with the installer's last words, MachineLost.
    """
    began = time.monotonic()
    plan = _plan(connection.destination, found, own_python, wheel or build_wheel())
    script = f"[ -e {shlex.quote(plan.code)}/.ready ] && echo code\n"
    script += f"[ -e {shlex.quote(plan.packages)} ] && echo packages\necho asked\n"
    done = connection.call("sh -s", script.encode())
    there = done.stdout.decode(errors="replace").split()
    if "asked" not in there:
        raise DeployFailed(f"{connection.destination} did not answer: {last_line(done.text())}")
    if plan.venv is not None and "packages" not in there:
        _make_venv(connection, plan, found)
    if "code" not in there:
        _send_code(connection, plan, found)
    if own_python and "packages" not in there:
        _check_own(connection, plan)
    how = "ready" if "code" in there else "wheel"
    how = "environment" if plan.venv is not None and "packages" not in there else how
    seconds = time.monotonic() - began
    if how != "ready":
        _log.info("deployed on %s in %.1f s (%s)", connection.destination, seconds, how)
    return Deployment(_python(plan), plan.wheel.key, round(seconds, 3), how)


def _python(plan: _Plan) -> tuple[str, ...]:
    # -P: no file of the folder where it is started shadows a module; PYTHONPATH still counts
    return ("env", f"PYTHONPATH={plan.code}", "PYTHONNOUSERSITE=1", plan.interpreter, "-P")


def _plan(destination: str, found: Probe, own_python: bool, wheel: Wheel) -> _Plan:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    python = found.pythons[0] if found.pythons else None
    if python is None and (own_python or not found.uv):
        raise DeployFailed(
            f"{destination} has no Python {oldest} or newer, and no uv to bring one: install one of them there "
            "(Debian: apt install python3 python3-venv), or name an interpreter (outliers machines add ... --python PATH)"
        )
    if not found.uv and not own_python and python is not None and not python.venv:
        raise DeployFailed(
            f"the Python of {destination} ({python.path}) can't make environments, and there is no uv: install one of them "
            "there (Debian: apt install python3-venv)"
        )
    system_torch = bool(python and python.torch) and not own_python
    needed, held = requirements(), constraints()
    if system_torch:
        needed, held = without_torch(needed), without_torch(held)
    version = python.version[:2] if python else OLDEST_PYTHON
    mark = json.dumps([needed, held, version, python.path if python else "", system_torch])
    key = hashlib.sha256(mark.encode()).hexdigest()[:16]
    base = f"{found.root}/deploy"
    return _Plan(
        wheel=wheel,
        code=f"{base}/code/{wheel.key}",
        venv=None if own_python else f"{base}/venvs/{key}",
        packages=f"{base}/own-{key}.ready" if own_python else f"{base}/venvs/{key}/.ready",
        python=python,
        requirements="\n".join(needed) + "\n",
        constraints="\n".join(held) + "\n",
    )


def _make_venv(connection: Connection, plan: _Plan, found: Probe) -> None:
    """Make the environment; another deployment at the same time waits for the lock, and then finds it made."""
    _log.info("installing the environment on %s (once; minutes where torch is downloaded)", connection.destination)
    base = f"{found.root}/deploy"
    files = {f"{base}/{name}.txt": text for name, text in _texts(plan).items()}
    writing = "".join(
        f"cat > {shlex.quote(path)} <<'END_OF_LINES'\n{text}END_OF_LINES\n" for path, text in files.items()
    )
    uv = shlex.quote(found.uv) if found.uv else f"{shlex.quote(base)}/uv/bin/uv"
    bring_uv = ""
    if not found.uv and plan.python is not None:
        bring_uv = (
            f"[ -x {uv} ] || {{ echo 'installing uv'; {shlex.quote(plan.python.path)} -m venv {shlex.quote(base)}/uv && "
            f"{shlex.quote(base)}/uv/bin/python -m pip install --quiet --disable-pip-version-check uv; }}\n"
        )
    which = plan.python.path if plan.python else ".".join(map(str, OLDEST_PYTHON))
    system = "--system-site-packages" if plan.python and plan.python.torch else ""
    venv = shlex.quote(plan.venv or "")
    requirement, constraint = (shlex.quote(path) for path in files)
    script = f"""set -eu
{_private(found.root)}
mkdir -p {shlex.quote(base)}/venvs {shlex.quote(base)}/code
exec 9>>{shlex.quote(base)}/lock
flock 9
[ -e {venv}/.ready ] && exit 0
{writing}{bring_uv}rm -rf {venv}
{uv} venv --quiet {system} --python {shlex.quote(which)} {venv}
{uv} pip install --python {venv}/bin/python ${{PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}} -c {constraint} -r {requirement}
touch {venv}/.ready
"""
    _run_script(connection, script, "the environment could not be installed")


def _texts(plan: _Plan) -> dict[str, str]:
    key = (plan.venv or "").rpartition("/")[2]
    return {f"requirements-{key}": plan.requirements, f"constraints-{key}": plan.constraints}


def _send_code(connection: Connection, plan: _Plan, found: Probe) -> None:
    """Send the wheel and unpack it: of a pure Python wheel that is all that installing does."""
    base, code = shlex.quote(f"{found.root}/deploy"), shlex.quote(plan.code)
    wheel = f"{base}/code/.{plan.wheel.key}.$$.whl"
    unpack = f"{shlex.quote(plan.interpreter)} -m zipfile -e {wheel} {code}.$$ && touch {code}.$$/.ready"
    # what a power cut left without its mark is in the way; what another deployer has put there meanwhile is the same
    settle = f"{{ [ -e {code}/.ready ] || rm -rf {code}; }} && {{ mv -T {code}.$$ {code} 2>/dev/null || [ -e {code}/.ready ]; }}"
    command = (
        f"{_private(found.root)} && mkdir -p {base}/code && cat > {wheel} && rm -rf {code}.$$ && {unpack} && {settle}; "
        f"code=$?; rm -rf {wheel} {code}.$$; exit $code"
    )
    done = connection.call(command, plan.wheel.data, UPLOAD_SECONDS)
    if done.returncode:
        raise DeployFailed(
            f"the program could not be put on {connection.destination}: {last_line(done.text()) or 'no word'}"
        )


def _private(root: str) -> str:
    """A shell command that makes the folder of a host, where it is absent, for its user alone: from its first moment."""
    folder = shlex.quote(root)
    return (
        f'{{ [ -d {folder} ] || {{ mkdir -p "$(dirname {folder})" && mkdir -m 700 {folder}; }} || [ -d {folder} ]; }}'
    )


def last_line(text: str) -> str:
    """The last line of what a program said: of a traceback, the error."""
    return cut(text.strip().rpartition("\n")[2].strip(), _LINE_CHARS)


def _check_own(connection: Connection, plan: _Plan) -> None:
    """A Python of the user's own must have all that is needed; nothing is installed into it."""
    check = [*_python(plan), "-m", "outliers.machines.check", *requirements()]
    command = f"{shlex.join(check)} && touch {shlex.quote(plan.packages)}"
    done = connection.call(command, timeout_seconds=120)
    if done.returncode:
        lacking = cut(done.text(), _LINE_CHARS)
        raise DeployFailed(
            f"{plan.interpreter} on {connection.destination} lacks {lacking}: install it there, or leave --python out and "
            "let an environment be made"
        )


def _run_script(connection: Connection, script: str, what: str) -> None:
    """Run a script whose lines are shown as they come; DeployFailed with the last of them."""
    said: deque[str] = deque(maxlen=12)
    began = time.monotonic()
    try:
        for number, line in enumerate(_lines(connection, script)):
            if number >= INSTALLER_LINES:
                raise JobFailed(f"it printed more than {INSTALLER_LINES:,} lines, and was cut off")
            if time.monotonic() - began > INSTALL_SECONDS:
                raise JobFailed(f"it took longer than {INSTALL_SECONDS:,.0f} s, and was cut off")
            said.append(line)
            _log.info("%s: %s", connection.destination, line)
    except JobFailed as error:
        last = "\n  ".join(said)
        raise DeployFailed(f"{what} on {connection.destination}: {error}\n  {last}") from error


def _lines(connection: Connection, script: str) -> Iterator[str]:
    # over standard input, which has no limit, and read to its end first: what the script runs would take the rest for its own
    command = 'exec 2>&1; eval "$(cat)"'
    for line in connection.lines(command, SILENCE_SECONDS, script.encode()):
        if text := visible(cut(last_drawn(line.data), _LINE_CHARS)).rstrip():
            yield text
