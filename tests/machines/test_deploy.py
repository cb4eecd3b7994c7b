"""What a host has, what is refused, and this program on it: one wheel by its hash, an environment that is reused."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from outliers import errors
from outliers.hardware import GB, Facts
from outliers.machines import deploy as deploying
from outliers.machines import probe as probing
from outliers.machines import wheel as wheels
from outliers.machines.base import MachineRequest
from outliers.machines.check import unmet
from outliers.machines.connection import Connection
from outliers.machines.deploy import deploy
from outliers.machines.local import LocalMachine
from outliers.machines.probe import Probe, Python, probe
from outliers.machines.rentals import Rentals
from outliers.machines.ssh import Host, Hosts, SshProvider, access
from outliers.machines.wheel import build_wheel
from tests.machines.test_wheel import UV
from tests.support.one_host import box, source, until, workspace
from tests.support.remote import PATH, QUIET, needs_sshd
from tests.support.s3 import free_ports

__all__ = ["box", "source", "workspace"]

TOOLS = ("sh", "env", "uname", "nproc", "sed", "cat", "dirname", "df", "timeout", "mkdir", "rm", "mv", "touch", "flock")


def bring(python=sys.executable):
    """Deploy with a Python of the host's own, over a connection of its own; what came of it, and the bytes sent."""
    connection = Connection("box")
    found = probe(connection, ".outliers", python)
    sent = connection.sent
    return deploy(connection, found, own_python=True), connection.sent - sent


def tool(folder, name, script):
    """A program of that name, for the PATH of sessions."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


# What a host has, and what is refused


@needs_sshd
def test_a_host_has_what_this_machine_has(box, workspace):
    found = access(Host("lab1", "box", python=sys.executable)).probe()
    here = LocalMachine(box.home).facts()
    assert (found.facts.cpus, found.facts.ram_bytes, found.facts.gpus) == (here.cpus, here.ram_bytes, here.gpus)
    assert found.facts.python == here.python
    assert abs(found.facts.ram_available_bytes - here.ram_available_bytes) < 0.2 * here.ram_bytes
    assert abs(found.facts.disk_free_bytes - here.disk_free_bytes) < 2 * GB
    assert found.root == str(box.home / ".outliers")
    assert list(box.home.iterdir()) == []  # asking leaves nothing there


@needs_sshd
@pytest.mark.parametrize(
    ("request_", "pieces"),
    [
        (MachineRequest(min_ram_bytes=9_000 * GB), ("9000.0 GB", "--min-cpu-ram", "the machine has")),
        (MachineRequest(min_disk_bytes=900_000 * GB), ("900000.0 GB", "--disk", "is free")),
        (MachineRequest(gpu_count=3), ("3 GPUs", "has 0")),
        (MachineRequest(max_price=1.0), ("$2.5 an hour", "$1 is allowed", "--max-price")),
    ],
)
def test_a_host_that_does_not_fit_is_refused_with_both_numbers(source, box, workspace, request_, pieces):
    offers, (excluded,) = source.offers(request_)
    assert not offers
    assert excluded.name == "lab1"
    with pytest.raises(errors.PlanRefused) as caught:
        source.ensure("m1", request_, "run-1", "a study")
    for piece in pieces:
        assert piece in excluded.reason
        assert piece in str(caught.value)
    assert Rentals(workspace).all() == ()
    assert list(box.home.iterdir()) == []


@needs_sshd
@pytest.mark.servers
def test_gpus_with_their_memory_and_the_filters(source, box, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    lines = "GPU-a, NVIDIA A100-SXM4-80GB, 81920\nGPU-b, NVIDIA L4, 23034"
    smi.write_text(f"#!/bin/sh\ncase \"$*\" in *uuid,name,memory.total*nounits*) echo '{lines}';; esac\n")
    smi.chmod(0o755)
    box.sessions(path=f"{tools}:{PATH}")
    ((offer,), _) = source.offers(MachineRequest(gpu_filter="a100", min_vram_bytes=80 * GB, gpu_count=1))
    assert [(gpu.name, gpu.total_bytes >> 20) for gpu in offer.facts.gpus] == [
        ("NVIDIA A100-SXM4-80GB", 81_920),
        ("NVIDIA L4", 23_034),
    ]
    for request, pieces in [
        (MachineRequest(gpu_filter="H100"), ("'H100'", "has 0", "NVIDIA L4")),
        (MachineRequest(gpu_count=2, min_vram_bytes=80 * GB), ("80.0 GB", "24.2 GB")),
        (MachineRequest(gpu_count=3), ("3 GPUs", "has 2")),
    ]:
        _, (excluded,) = source.offers(request)
        assert all(piece in excluded.reason for piece in pieces), excluded.reason
    assert source.ensure("m1", MachineRequest(gpu_count=2), "r", "t").facts().gpus == offer.facts.gpus
    box.sessions(environment=QUIET | {"CUDA_VISIBLE_DEVICES": "1"})
    ((offer,), _) = source.offers(MachineRequest())
    assert [gpu.name for gpu in offer.facts.gpus] == ["NVIDIA L4"]


@needs_sshd
@pytest.mark.servers
def test_the_cheapest_host_that_fits_is_used_and_one_that_is_down_is_told(source, box, workspace):
    (closed,) = free_ports(1)
    with box.config.open("a") as config:
        config.write(f"Host gone\n  HostName 127.0.0.1\n  Port {closed}\n")
    for name, destination, price in (("dear", "box", 9.0), ("cheap", "box", 0.5), ("gone", "gone", 0.1)):
        Hosts(workspace).add(Host(name, destination, python=sys.executable, price_per_hour=price))
    offers, (excluded,) = source.offers(MachineRequest())
    assert [offer.name for offer in offers] == ["cheap", "lab1", "dear"]
    assert excluded.name == "gone"
    assert "refused" in excluded.reason
    source.ensure("m1", MachineRequest(among=("lab1", "dear")), "run-1", "a study")
    (rental,) = source.list()
    assert (rental.place, rental.price_per_hour, rental.state) == ("lab1", 2.5, "up")
    with pytest.raises(errors.MachineLost, match="gone can't be reached"):
        source.ensure("m2", MachineRequest(host="gone"), "run-1", "a study")


def answered(**lines):
    """What a host's shell answers, as the probe takes it apart."""
    usual = {
        "system": ["Linux x86_64"], "root": ["/home/anna/.outliers"], "writable": ["/home/anna"], "cpus": ["8"],
        "ram_kb": ["64000000"], "available_kb": ["60000000"], "disk_kb": ["500000000"], "visible": ["all"],
    }  # fmt: skip
    return probing._read("box", usual | lines)


def test_the_memory_of_a_container_is_its_limit():
    """The lowest of all levels; `max` is not a level."""
    assert answered(limit=["max"]).facts.ram_bytes == 64_000_000 * 1024
    facts = answered(limit=["max", "32000000000", "48000000000"]).facts
    assert (facts.ram_bytes, facts.ram_available_bytes) == (32_000_000_000, 32_000_000_000)
    assert answered().facts.ram_available_bytes == 60_000_000 * 1024


def test_the_python_that_brings_a_torch_is_taken_first_and_else_the_oldest_that_will_do():
    lines = [
        "3.13.1|/usr/bin/python3.13||True",
        "3.11.4|/usr/bin/python3.11||True",
        "3.12.3|/opt/conda/bin/python|2.8.0|True",
    ]
    found = answered(python=["3.9.2|/usr/bin/python3.9|2.1|True", *lines])
    assert [one.path for one in found.pythons] == [
        "/opt/conda/bin/python",
        "/usr/bin/python3.11",
        "/usr/bin/python3.13",
    ]
    assert found.facts.python == "3.12.3"


# To a host


def plan_of(found, wheel, **options):
    return deploying._plan("box", found, wheel=wheel, **{"own_python": False, **options})


def test_an_environment_is_reused_for_the_same_needs_constraints_and_python_alone(monkeypatch):
    wheel, facts = build_wheel(), Facts(1, GB, GB, GB, (), "3.11.2")
    python = Python((3, 11, 2), "/usr/bin/python3", "", True)
    found = Probe(facts, "Linux", "/root/.outliers", (python,), "/usr/bin/uv")
    first = plan_of(found, wheel)
    assert (
        plan_of(found, replace(wheel, sha256="f" * 64)).venv == first.venv
    )  # another wheel beside the same environment
    later = replace(found, pythons=(replace(python, version=(3, 11, 9)),))
    assert plan_of(later, wheel).venv == first.venv  # a patch of the same Python
    others = [
        plan_of(replace(found, pythons=(replace(python, version=(3, 12, 1)),)), wheel),
        plan_of(replace(found, pythons=(replace(python, path="/opt/python3"),)), wheel),
        plan_of(replace(found, pythons=(replace(python, torch="2.8.0"),)), wheel),
    ]
    monkeypatch.setattr(deploying, "constraints", lambda: ("numpy==1.0",))
    others.append(plan_of(found, wheel))
    monkeypatch.setattr(deploying, "requirements", lambda: ("numpy",))
    others.append(plan_of(found, wheel))
    assert len({first.venv, *(one.venv for one in others)}) == 6
    own = plan_of(found, wheel, own_python=True)
    assert (own.venv, own.interpreter) == (None, "/usr/bin/python3")


@needs_sshd
def test_the_wheel_is_sent_once_and_a_changed_one_alone(box, monkeypatch):
    first, sent = bring()
    wheel = build_wheel()
    assert (first.how, first.wheel) == ("wheel", wheel.key)
    assert len(wheel.data) < sent < len(wheel.data) + 5_000
    second, sent = bring()
    assert (second.how, second.python) == ("ready", first.python)
    assert sent < 1_000
    code = "import outliers, sys; print(outliers.__file__)"
    place = subprocess.run([*first.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert place == str(box.home / f".outliers/deploy/code/{wheel.key}/outliers/__init__.py")
    changed = replace(wheel, sha256="f" * 64)
    monkeypatch.setattr(deploying, "build_wheel", lambda: changed)
    third, sent = bring()
    assert (third.how, third.wheel) == ("wheel", "f" * 16)
    assert sent < len(wheel.data) + 5_000
    # jobs of the version before keep theirs
    assert {path.name for path in (box.home / ".outliers/deploy/code").iterdir()} == {wheel.key, "f" * 16}


@needs_sshd
def test_several_at_once_bring_one(box):
    with ThreadPoolExecutor(4) as pool:
        made = [future.result()[0] for future in [pool.submit(bring) for _ in range(4)]]
    assert {one.python for one in made} == {made[0].python}
    assert [path.name for path in (box.home / ".outliers/deploy/code").iterdir()] == [made[0].wheel]
    assert bring()[0].how == "ready"


@needs_sshd
def test_half_a_wheel_is_not_taken_for_one(box, monkeypatch):
    whole = build_wheel()
    monkeypatch.setattr(deploying, "build_wheel", lambda: replace(whole, data=whole.data[: len(whole.data) // 2]))
    with pytest.raises(errors.DeployFailed, match=r"(?s)could not be put on box: .*not a zip file"):
        bring()
    assert list((box.home / ".outliers/deploy/code").iterdir()) == []
    monkeypatch.setattr(deploying, "build_wheel", lambda: whole)
    assert bring()[0].how == "wheel"
    assert bring()[0].how == "ready"


@needs_sshd
@pytest.mark.servers
@pytest.mark.parametrize(("name", "script"), [("cat", "head -c 9000; sleep 91"), ("mv", "sleep 91")])
def test_a_host_that_ends_in_the_middle_is_sent_it_again(box, tmp_path, name, script):
    """Ended while the wheel arrives, and when it is unpacked but has not got its name."""
    box.sessions(path=f"{tool(tmp_path / 'tools', name, script)}:{PATH}")
    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(bring)
        until(lambda: any("sleep 91" in command for _, command in box.processes()))
        box.kill()
        with pytest.raises(errors.MachineLost):
            broken.result(30)
    box.boot()
    box.sessions(path=PATH)
    assert bring()[0].how == "wheel"
    assert bring()[0].how == "ready"


@needs_sshd
def test_an_own_python_that_lacks_packages_is_refused_with_their_names(box, tmp_path, workspace):
    bare = tmp_path / "bare"
    Hosts(workspace).add(Host("lab1", "box", python=str(bare / "bin/python")))
    lacking = SshProvider(workspace)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    for _ in range(2):
        with pytest.raises(errors.DeployFailed, match=r"bare/bin/python on box lacks ") as caught:
            bring(str(bare / "bin/python"))
        assert all(name in str(caught.value) for name in wheels.names())
        assert "install it there, or leave --python out" in str(caught.value)
        with pytest.raises(errors.DeployFailed):
            lacking.ensure("m1", MachineRequest(), "run-1", "a study")
        assert lacking.list() == ()
        # also where another one, that has all, was used before
        assert bring()[0].how in ("wheel", "ready")


def test_a_package_that_is_too_old_is_named_with_both_versions():
    here = importlib.metadata.version("psutil")
    assert unmet(["psutil>=1.0", "psutil>=999", "no-such-package>=2"]) == [
        f"psutil>=999 (it has {here})",
        "no-such-package>=2",
    ]


@needs_sshd
def test_what_a_power_cut_left_of_a_wheel_is_replaced(box):
    """The folder has its name, and not the mark that all of it is there."""
    first, _ = bring()
    code = box.home / ".outliers/deploy/code" / first.wheel
    (code / ".ready").unlink()
    (code / "outliers/machines/agent.py").write_text("torn")
    assert bring()[0].how == "wheel"
    assert (code / "outliers/machines/agent.py").read_text() != "torn"
    assert bring()[0].how == "ready"


@needs_sshd
@pytest.mark.parametrize("script", [None, "echo 'python=3.9.2|/usr/bin/python3|2.1.0|True'"])
def test_no_python_and_no_uv_names_both_remedies(box, tmp_path, script):
    """None at all, and one that is too old, whatever torch it brings."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name, path=PATH))
    if script:
        tool(folder, "python3", script)
    box.sessions(path=str(folder))
    connection = Connection("box")
    found = probe(connection, ".outliers")
    assert (found.pythons, found.uv, found.facts.python) == ((), "", "")
    with pytest.raises(
        errors.DeployFailed, match=r"box has no Python 3.11 or newer, and no uv .*python3-venv.*--python"
    ):
        deploy(connection, found)


@needs_sshd
def test_a_python_that_makes_no_environments_names_its_remedy(box):
    connection = Connection("box")
    found = probe(connection, ".outliers", sys.executable)
    bare = replace(found, uv="", pythons=(replace(found.pythons[0], venv=False),))
    with pytest.raises(errors.DeployFailed, match=r"can't make environments, .*no uv.*python3-venv"):
        deploy(connection, bare)


@needs_sshd
@pytest.mark.servers
@pytest.mark.skipif(UV is None, reason="needs uv")
def test_an_environment_is_made_once_and_half_of_one_is_made_again(box, tmp_path, monkeypatch):
    monkeypatch.setattr(deploying, "requirements", lambda: ("psutil>=6.0",))
    monkeypatch.setattr(deploying, "constraints", lambda: (f"psutil=={importlib.metadata.version('psutil')}",))
    cache = subprocess.run([UV, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    kept = {name: os.environ[name] for name in ("SSL_CERT_FILE", "PIP_FIND_LINKS") if name in os.environ}
    environment = QUIET | kept | {"UV_CACHE_DIR": cache}
    slow = tool(tmp_path / "tools", "uv", f'case "$*" in pip*) echo begun; sleep 90;; esac; exec {UV} "$@"')
    box.sessions(path=f"{slow}:{PATH}", environment=environment)

    def make():
        connection = Connection("box")
        return deploy(connection, probe(connection, ".outliers"))

    with ThreadPoolExecutor(3) as pool:
        broken = pool.submit(make)
        until(lambda: any("sleep 90" in command for _, command in box.processes()))
        box.kill()
        with pytest.raises(errors.MachineLost):
            broken.result(30)
        (half,) = (box.home / ".outliers/deploy/venvs").iterdir()
        assert not (half / ".ready").exists()
        (half / "leftover").touch()
        tool(slow, "uv", f'exec {UV} "$@"')
        box.boot()
        made = [future.result() for future in [pool.submit(make) for _ in range(2)]]
    assert [one.how for one in made] == ["environment", "environment"]
    assert not (half / "leftover").exists()
    assert (half / ".ready").exists()
    ready = make()
    assert (ready.how, ready.python) == ("ready", made[0].python)
    code = "import outliers.events.stream, psutil, sys; print(psutil.__version__, sys.prefix)"
    done = subprocess.run([*ready.python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{importlib.metadata.version('psutil')} {half}\n"
    # what can't be installed is reported in the installer's words, and leaves nothing that counts
    monkeypatch.setattr(deploying, "requirements", lambda: ("psutil>=999",))
    with pytest.raises(errors.DeployFailed, match=r"(?s)could not be installed on box.*psutil"):
        make()
    assert list(half.parent.glob("*/.ready")) == [half / ".ready"]
