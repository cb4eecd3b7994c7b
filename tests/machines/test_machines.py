"""What fits a request, and this computer as a machine: real commands, real files, a real (small) nvidia-smi."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outliers import errors
from outliers.hardware import GB, Facts, Gpu, find_gpus
from outliers.jobs import jobs
from outliers.jobs.jobs import JobSpec
from outliers.machines.base import MachineRequest, fits
from outliers.machines.local import LocalMachine, LocalProvider, instance_id
from outliers.machines.providers import PROVIDERS, provider
from outliers.machines.remote import download_seconds
from outliers.machines.sky import SkyProvider
from outliers.machines.ssh import SshProvider
from outliers.spec import ComputeSpec
from outliers.untrusted.bounds import RECEIVED_BYTES

MIB = 1 << 20
A100_80 = Gpu("NVIDIA A100-SXM4-80GB", 81_920 * MIB)
A100_79 = Gpu("NVIDIA A100 80GB PCIe", int(79.1 * (1 << 30)))  # what torch sees of one
A100_40 = Gpu("NVIDIA A100-PCIE-40GB", 40_960 * MIB)
H100 = Gpu("NVIDIA H100 80GB HBM3", 81_559 * MIB)
L4 = Gpu("NVIDIA L4", 23_034 * MIB)


def facts(*gpus, ram=64.0, free_ram=32.0, disk=100.0):
    return Facts(8, round(ram * GB), round(free_ram * GB), round(disk * GB), gpus, "3.11.9")


# (what the machine has, what the spec asks, the pieces of each reason)
FITS = [
    # Nothing asked, with and without a GPU.
    (facts(), {}, []),
    (facts(L4), {}, []),
    # 0 uses none, wherever.
    (facts(), {"gpu_count": 0}, []),
    (facts(L4), {"gpu_count": 0}, []),
    # Counts: as many, more, fewer.
    (facts(L4), {"gpu_count": 1}, []),
    (facts(L4, L4), {"gpu_count": 1}, []),
    (facts(L4), {"gpu_count": 2}, [("2 GPUs", "has 1", "NVIDIA L4")]),
    (facts(), {"gpu_count": 1}, [("1 GPU asked", "has 0", "none")]),
    # A kind without a count wants one of it; case does not matter; a part of the name is enough.
    (facts(A100_80), {"gpu_filter": "a100"}, []),
    (facts(A100_80), {"gpu_filter": "H100"}, [("1 GPU", "'H100'", "has 0", "A100-SXM4")]),
    (facts(), {"gpu_filter": "A100"}, [("'A100'", "has 0")]),
    (facts(A100_80, H100), {"gpu_filter": "A100", "gpu_count": 2}, [("2 GPUs", "has 1")]),
    # An 80 GB card has 80 GB, by either driver's count, and not 86.
    (facts(A100_80), {"min_vram": 80.0}, []),
    (facts(A100_79), {"min_vram": 80.0}, []),
    (facts(H100), {"min_vram": 80.0}, []),
    (facts(L4), {"min_vram": 24.0}, []),
    (facts(A100_80), {"min_vram": 86.0}, [("86.0 GB", "85.9 GB")]),
    (facts(), {"min_vram": 8.0}, [("1 GPU", "has 0")]),
    # The memory counts of the cards that bear the name, and of as many as are wanted.
    (facts(A100_40, H100), {"gpu_filter": "A100", "min_vram": 80.0}, [("80.0 GB", "42.9 GB")]),
    (facts(A100_40, A100_80), {"gpu_count": 1, "min_vram": 80.0}, []),
    (facts(A100_40, A100_80), {"gpu_count": 2, "min_vram": 80.0}, [("2 GPUs", "80.0 GB", "42.9 GB")]),
    # Memory and disk: the very number passes, a little less does not, and the message shows the difference.
    (facts(ram=64), {"min_cpu_ram": 64.0}, []),
    (facts(ram=63.99), {"min_cpu_ram": 64.0}, [("64.00 GB", "63.99 GB", "--min-cpu-ram")]),
    (facts(disk=100), {"disk": 100.0}, []),
    (facts(disk=99.5), {"disk": 100.0}, [("100.0 GB", "99.5 GB", "--disk")]),
    # What the user asks is of the total; what the study needs is of what is free.
    (facts(ram=64, free_ram=1), {"min_cpu_ram": 64.0}, []),
    (facts(free_ram=32), {"needed_ram_bytes": 33 * GB}, [("33.0 GB", "32.0 GB")]),
    (facts(disk=100), {"needed_disk_bytes": 101 * GB}, [("101.0 GB", "100.0 GB")]),
    # Every reason is given, not the first.
    (
        facts(),
        {"gpu_count": 1, "min_cpu_ram": 80.0, "disk": 500.0},
        [("1 GPU",), ("80.0 GB", "64.0 GB"), ("500.0 GB",)],
    ),
]


@pytest.mark.parametrize(("machine", "asked", "reasons"), FITS)
def test_fits(machine, asked, reasons):
    needed = {key: value for key, value in asked.items() if key.startswith("needed_")}
    compute = ComputeSpec(**{key: value for key, value in asked.items() if key not in needed})
    found = fits(machine, MachineRequest.from_spec(compute, **needed))
    assert len(found) == len(reasons)
    for text, pieces in zip(found, reasons, strict=True):
        assert [piece for piece in pieces if piece not in text] == []


def test_no_gpu_and_a_kind_of_gpu_contradict():
    for more in ({"gpu_filter": "A100"}, {"min_vram": 8}):
        with pytest.raises(errors.BadInput, match="gpu-count 0"):
            MachineRequest.from_spec(ComputeSpec(gpu_count=0, **more))


SMALL = st.integers(0, 5)
GPUS = st.lists(st.builds(Gpu, st.sampled_from(["A100", "H100", "L4"]), SMALL), max_size=4)
MACHINES = st.builds(Facts, st.just(1), SMALL, SMALL, SMALL, GPUS.map(tuple), st.just("3.11"))
REQUESTS = st.builds(
    MachineRequest, st.none() | SMALL, st.sampled_from([None, "100", "l4"]), SMALL, SMALL, SMALL, SMALL, SMALL
)


@given(MACHINES, REQUESTS)
def test_fits_is_what_a_count_of_the_cards_says(machine, request):
    suitable = [
        gpu
        for gpu in machine.gpus
        if gpu.total_bytes >= request.min_vram_bytes and (request.gpu_filter or "").upper() in gpu.name
    ]
    count = request.gpu_count
    if count is None:
        count = 1 if request.gpu_filter or request.min_vram_bytes else 0
    enough = len(suitable) >= count
    enough &= machine.ram_bytes >= request.min_ram_bytes and machine.ram_available_bytes >= request.needed_ram_bytes
    enough &= machine.disk_free_bytes >= max(request.min_disk_bytes, request.needed_disk_bytes)
    assert (fits(machine, request) == ()) == enough


@given(MACHINES, REQUESTS)
def test_another_card_never_hurts(machine, request):
    if not fits(machine, request):
        assert not fits(replace(machine, gpus=(*machine.gpus, Gpu("A100", 1))), request)


# GPUs


def smi(folder, body):
    """A program that answers as nvidia-smi does to the very query, and fails on any other."""
    path = folder / "nvidia-smi"
    query = "--query-gpu=uuid,name,memory.total --format=csv,noheader,nounits"
    path.write_text(f'#!/bin/sh\n[ "$*" = "{query}" ] || exit 2\n{body}\n')
    path.chmod(0o755)
    return str(path)


TWO = "echo 'GPU-aa1, NVIDIA A100-SXM4-80GB, 81920'; echo 'GPU-ab2, NVIDIA L4, 23034'"


@pytest.mark.parametrize(
    ("body", "visible", "found"),
    [
        (TWO, None, (A100_80, L4)),
        # As CUDA reads CUDA_VISIBLE_DEVICES: order counts, empty and -1 hide all, an unknown one ends the list.
        (TWO, "", ()),
        (TWO, "-1", ()),
        (TWO, "1", (L4,)),
        (TWO, "1,0", (L4, A100_80)),
        (TWO, "0,7,1", (A100_80,)),
        (TWO, "GPU-ab", (L4,)),
        (TWO, "GPU-a", ()),
        # No driver; a card that shares the machine's memory; a driver without cards.
        ("echo 'NVIDIA-SMI has failed'; exit 9", None, ()),
        ("echo 'GPU-c, NVIDIA GB10, [N/A]'", None, (Gpu("NVIDIA GB10", 0),)),
        ("echo 'No devices were found'", None, ()),
    ],
)
def test_find_gpus(tmp_path, body, visible, found):
    assert find_gpus(smi(tmp_path, body), visible) == found


def test_no_nvidia_smi(tmp_path):
    assert find_gpus(str(tmp_path / "nvidia-smi")) == ()


# The provider


def test_offers_say_what_there_is_or_what_is_short(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    local = LocalProvider(tmp_path, smi(tmp_path, TWO))
    (offer,), excluded = local.offers(MachineRequest(gpu_count=2))
    assert (offer.provider, offer.price_per_hour, offer.facts.gpus, excluded) == ("local", 0.0, (A100_80, L4), ())
    assert local.ensure("study-1", MachineRequest(gpu_count=2), "run", "a study").name == "study-1"
    offers, (excluded,) = local.offers(MachineRequest(gpu_count=3, needed_disk_bytes=10**18))
    assert offers == () and "3 GPUs" in excluded.reason and "has 2" in excluded.reason
    with pytest.raises(errors.PlanRefused, match=r"3 GPUs.*has 2.*; the study needs 1000000000\.0 GB of disk"):
        local.ensure("study-1", MachineRequest(gpu_count=3, needed_disk_bytes=10**18), "run", "a study")


def test_this_computer_is_never_rented_nor_released(tmp_path):
    local = provider("local", tmp_path)
    assert local.list() == () and "nothing to release" in local.release("study-1")
    assert local.find("study-1") is not None
    assert not list(tmp_path.iterdir())


def test_facts_are_of_this_computer(tmp_path):
    found = LocalMachine(tmp_path / "not" / "yet").facts()
    assert 0 < found.ram_available_bytes <= found.ram_bytes and found.cpus >= 1 and found.disk_free_bytes > 0
    assert found.python == sys.version.split()[0] and not (tmp_path / "not").exists()


def test_providers_by_name(tmp_path, monkeypatch):
    monkeypatch.delenv("OUTLIERS_PROVIDER", raising=False)
    assert isinstance(provider("", tmp_path), LocalProvider)
    monkeypatch.setenv("OUTLIERS_PROVIDER", "sky")
    assert isinstance(provider("local", tmp_path), LocalProvider)
    for name, kind in (("", SkyProvider), ("ssh", SshProvider), ("local", LocalProvider)):
        assert isinstance(provider(name, tmp_path), kind)
    with pytest.raises(errors.BadInput, match=r"'Local' is not known: use local, sky, ssh"):
        provider("Local", tmp_path)
    assert set(PROVIDERS) == {"local", "sky", "ssh"}


# The machine


def test_the_instance_is_the_disk(tmp_path):
    one = instance_id(tmp_path / "a")
    assert len(one) == 32 and one == instance_id(tmp_path / "a") == LocalMachine(tmp_path / "a").instance_id
    assert one != instance_id(tmp_path / "b")
    (tmp_path / "file").touch()
    with pytest.raises(errors.WorkspaceError):
        instance_id(tmp_path / "file" / "below")


def test_processes_at_once_agree_on_the_instance(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom outliers.machines.local import instance_id\n"
        "root = Path(sys.argv[1]); (root / f'ready-{sys.argv[2]}').touch()\n"
        "while not (root / 'go').exists(): pass\nfor i in range(40): print(instance_id(root / 'workspaces' / str(i)))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], stdout=subprocess.PIPE) for i in range(4)
    ]
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("ready-*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert len({racer.communicate(timeout=20)[0] for racer in racers}) == 1
    assert {path.name for path in tmp_path.glob("workspaces/*/*")} == {"instance"}


def test_run(tmp_path):
    machine = LocalMachine(tmp_path)
    done = machine.run(["sh", "-c", "echo out; echo err >&2; exit 3"], 10)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert machine.run([*machine.python, "-c", "import outliers; print(1)"], 30).stdout == "1\n"
    with pytest.raises(errors.JobFailed, match="no-such-program"):
        machine.run(["no-such-program"], 1)


def test_run_ends_the_whole_family_in_time(tmp_path):
    began = time.monotonic()
    with pytest.raises(errors.JobFailed, match=r"0\.3 s"):
        LocalMachine(tmp_path).run(["sh", "-c", "sleep 30 & sleep 30"], 0.3)
    assert time.monotonic() - began < 5


def test_files_go_and_come(tmp_path):
    machine, source = LocalMachine(tmp_path / "workspace"), tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_bytes(b"a" * 100)
    (source / "deep" / "b").write_bytes(b"b")
    machine.upload(source, "corpora/x")
    machine.upload(source / "a", str(tmp_path / "elsewhere" / "c"))
    machine.upload(source / "deep" / "b", "corpora/x/a")  # replaces
    machine.download("corpora/x", tmp_path / "back")
    found = {str(path.relative_to(tmp_path / "back")): path.read_bytes() for path in (tmp_path / "back").rglob("?")}
    assert found == {"a": b"b", "deep/b": b"b"}
    assert (tmp_path / "elsewhere" / "c").read_bytes() == b"a" * 100
    # Onto itself: what the flow asks for on this computer, where nothing need move.
    machine.download("corpora/x", Path(machine.workspace) / "corpora" / "x")
    assert (tmp_path / "workspace/corpora/x/a").read_bytes() == b"b"
    with pytest.raises(errors.BadInput, match="nothing"):
        machine.download("results/none", tmp_path / "back")


@pytest.mark.servers
def test_a_job_on_a_machine(tmp_path):
    machine = provider("local", tmp_path).ensure("m", MachineRequest(), "run", "a study")
    handle = machine.start(JobSpec("step", (*machine.python, "-c", "print('hello')")))
    logs = [event.message for event in machine.follow(handle) if event.kind == "log"]
    machine.result(handle)
    assert logs == ["hello"] and machine.status(handle) == "done" and machine.cancel(handle) == "done"
    assert handle == jobs.newest(tmp_path, "step")
    with pytest.raises(errors.JobFailed, match="exit code 4"):
        machine.result(machine.start(JobSpec("step", ("sh", "-c", "exit 4"))))


def test_a_large_download_has_the_time_that_it_takes_on_a_slow_line():
    """The numbers of a study have ten minutes; a summary of DeepSeek-V3, 3 GB with its experts, has an hour at 8 Mbit/s."""
    assert download_seconds(0) == download_seconds(RECEIVED_BYTES) == 600
    assert download_seconds(3_600_000_000) == 3600
