"""Renting through SkyPilot without a network: its own catalog reader and optimizer on CSVs written here.

SkyPilot runs once, in a process with a HOME of its own (`sky_probe`), and what it did is looked at here; `select` is plain
arithmetic and is held against a brute-force reading of the same CSVs.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.hardware import GB, Gpu
from outliers.machines.base import MachineRequest
from outliers.machines.catalog import Row, disk_gb, select, vram_bytes
from outliers.machines.sky_engine import own_key_travels
from tests.support.sky_catalogs import CSVS, write_catalogs

GIB = 1 << 30
ROOT = Path(__file__).parents[2]


def users_files() -> dict[str, tuple[int, int]]:
    home = Path.home()
    names = [".bashrc", ".profile", ".bash_profile", ".zshrc", ".ssh", ".sky"]
    paths = [path for name in names for path in (home / name, *(home / name).rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def servers() -> set[int]:
    """Processes of SkyPilot's server."""
    found = psutil.process_iter(["pid", "cmdline"])
    return {one.info["pid"] for one in found if "sky.server.server" in " ".join(one.info["cmdline"] or ())}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What SkyPilot did, in a process and a HOME of its own."""
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: pip install -e '.[sky]'")
    home = tmp_path_factory.mktemp("home")
    write_catalogs(home)
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SKY", "AWS", "AZURE", "GOOGLE", "HF_"))
    }
    kept |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    before, running = users_files(), servers()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.sky_probe"],
        env=kept,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.rpartition("\nREPORT")[2])
    after = servers() - running
    ours = [pid for pid in after if psutil.pid_exists(pid) and psutil.Process(pid).environ().get("HOME") == str(home)]
    return report | {"log": done.stderr, "home": home, "untouched": before == users_files(), "servers": ours}


@pytest.fixture(scope="module")
def rows(real) -> tuple[Row, ...]:
    return tuple(Row(**row | {"gpu": row["gpu"] and Gpu(**row["gpu"])}) for row in real["rows"])


def names(found):
    return [one.offer.name for one in found[0]]


# What the catalogs give


def test_every_whole_cuda_machine_is_read_once_a_region(rows):
    """Zones are one place; spot prices, parts of a card, cards without CUDA and arm64 are left out."""
    left_out = {"g6f.large", "g4ad.xlarge", "g5g.xlarge", "p5.48xlarge", "m7g.2xlarge"}
    written = {(cloud, row[0], row[8]) for cloud, rows in CSVS.items() for row in rows if row[0] not in left_out}
    assert sorted((row.cloud, row.instance_type, row.region) for row in rows) == sorted(written)
    by_type = {row.instance_type: row for row in rows}
    assert by_type["2x_A100-80GB_SECURE"].gpus == (Gpu("A100-80GB", 80 * GIB),) * 2
    assert by_type["p4d.24xlarge"].gpus == (Gpu("A100", 40 * GIB),) * 8
    assert by_type["g6.xlarge"].gpus == (Gpu("L4", 24 * GB),)
    assert by_type["r6i.2xlarge"] == Row("aws", "us-east-1", "r6i.2xlarge", 8, 64 * GIB, 0.504)


# (cloud, name, what stands under SizeInMiB, cards, the bytes of one)
MEMORY = [
    ("lambda", "A100-80GB", 81_920, 8, 80 * GIB),
    ("runpod", "A100-80GB", 80, 2, 80 * GIB),
    ("vast", "H100", 2 * 81_559, 2, 81_559 << 20),
    ("aws", "L4", 22_888, 1, 24 * GB),
    ("aws", "L40S", 45_776, 1, 48 * GB),
    ("lambda", "A10", 24_576, 1, 24 * GIB),
    ("slurm", "A100-80GB", 0, 2, 80 * GIB),
    ("slurm", "gpu", 0, 2, 0),
]


@pytest.mark.parametrize(("cloud", "name", "mib", "count", "expected"), MEMORY)
def test_a_cards_memory_however_a_cloud_writes_it(cloud, name, mib, count, expected):
    assert vram_bytes(cloud, name, mib, count) == expected


def test_enabled_clouds_are_read_and_not_asked_for(real):
    assert real["enabled_before"] == []
    assert not real["database_before"]
    assert real["enabled_after"] == ["aws", "lambda", "runpod"]


def test_a_catalog_without_machines_says_what_to_do(real):
    kind, message = real["no_rows"]
    assert (kind, message) == (
        "PlanRefused", "the catalogs of kubernetes list no machine: `sky check` says which clouds can be used",
    )  # fmt: skip


def test_clouds_that_can_not_be_reached_have_a_line_each(real):
    kind, message = real["unreachable"]
    assert kind == "PlanRefused"
    head, *lines = message.split("\n")
    assert "no catalog of prices can be read" in head
    assert [line.split(":")[0].strip() for line in lines] == ["azure", "vast"]
    assert all(len(line) < 200 for line in lines), message


# What fits


def test_the_cheapest_of_several_with_two_large_a100s(rows):
    request = MachineRequest(gpu_count=2, gpu_filter="a100-80gb", min_vram_bytes=80 * GB)
    assert names(select(rows, request)) == [
        "runpod US 2x_A100-80GB_SECURE", "lambda us-east-1 gpu_8x_a100_80gb_sxm4", "aws us-west-2 p4de.24xlarge",
    ]  # fmt: skip
    offer = select(rows, request)[0][0].offer
    assert (offer.provider, offer.price_per_hour, offer.facts.cpus) == ("sky", 3.28, 16)
    assert offer.facts.ram_bytes == offer.facts.ram_available_bytes == 160 * GIB


def test_a_filter_takes_both_a100s_and_min_vram_leaves_the_small_one_out(rows):
    both = select(rows, MachineRequest(gpu_count=1, gpu_filter="A100"))
    large = select(rows, MachineRequest(gpu_count=1, gpu_filter="A100", min_vram_bytes=80 * GB))
    assert {one.row.gpu.name for one in both[0]} == {"A100", "A100-80GB"}
    assert {one.row.gpu.name for one in large[0]} == {"A100-80GB"}
    assert names(both)[0] == "lambda us-east-1 gpu_1x_a100_sxm4"
    assert names(large)[0] == "runpod US 1x_A100-80GB_SECURE"


def test_min_cpu_ram_is_the_machines_and_never_the_cards(rows):
    """Two A100s of 80 GB have 160 GB between them, and the first machine's own memory is 171.8."""
    request = MachineRequest(gpu_count=2, gpu_filter="A100-80GB", min_ram_bytes=172 * GB)
    assert names(select(rows, request))[0] == "lambda us-east-1 gpu_8x_a100_80gb_sxm4"
    assert names(select(rows, replace(request, min_ram_bytes=171 * GB)))[0] == "runpod US 2x_A100-80GB_SECURE"
    assert names(select(rows, replace(request, min_ram_bytes=0, needed_ram_bytes=172 * GB)))[0].startswith("lambda")


def test_the_price_is_of_the_whole_machine_and_its_cap_is_included(rows):
    request = MachineRequest(gpu_count=2, gpu_filter="A100-80GB", max_price=14.32)
    assert names(select(rows, request)) == ["runpod US 2x_A100-80GB_SECURE", "lambda us-east-1 gpu_8x_a100_80gb_sxm4"]
    assert names(select(rows, replace(request, max_price=14.31))) == ["runpod US 2x_A100-80GB_SECURE"]


def test_a_region_takes_the_price_of_that_region(rows):
    request = MachineRequest(gpu_count=8, gpu_filter="A100-80GB", region="US-East-1")
    found, _ = select(rows, request)
    assert [(one.offer.name, one.offer.price_per_hour) for one in found] == [
        ("lambda us-east-1 gpu_8x_a100_80gb_sxm4", 14.32), ("aws us-east-1 p4de.24xlarge", 40.96),
    ]  # fmt: skip


def test_without_gpus_only_what_no_other_beats(rows):
    found = names(select(rows, MachineRequest(gpu_count=0)))
    assert found[:3] == ["aws us-east-1 m6i.2xlarge", "aws us-east-1 r6i.2xlarge", "aws us-east-1 g6.xlarge"]
    assert not any("m5.2xlarge" in name for name in found)


def test_equal_prices_are_in_a_total_order(rows):
    request = MachineRequest(gpu_count=2, max_price=2.58)
    expected = ["lambda us-west-1 gpu_2x_a100", "runpod CA 2x_L4_COMMUNITY"]
    assert names(select(rows, request)) == names(select(rows[::-1], request)) == expected


def test_the_disk_has_room_for_the_image_beside_what_is_asked(rows):
    request = MachineRequest(min_disk_bytes=50 * GB, needed_disk_bytes=300 * GB + 1)
    assert disk_gb(request) == 361
    assert select(rows, request)[0][0].offer.facts.disk_free_bytes >= 300 * GB + 1
    assert disk_gb(MachineRequest()) == 100


# (what is asked, what must stand in the nearest miss)
MISSES = [
    # One machine is too dear by little: nearer than a cheap one with another card.
    ({"gpu_count": 2, "gpu_filter": "A100-80GB", "max_price": 3.0}, ("runpod", "$3.00", "$3.28")),
    ({"gpu_count": 1, "gpu_filter": "A100", "max_price": 1.2899999}, ("gpu_1x_a100_sxm4", "$1.2899999", "$1.2900000")),
    ({"gpu_filter": "A100", "min_vram_bytes": 90 * GB}, ("80GB", "90.0 GB", "85.9 GB")),
    ({"gpu_filter": "A100", "min_ram_bytes": 2000 * GB}, ("gpu_8x_a100_80gb_sxm4", "2000.0 GB", "1932.7 GB")),
    ({"gpu_count": 8, "gpu_filter": "L4"}, ("g6.12xlarge", "8 GPUs", "has 4")),
    ({"gpu_filter": "H100"}, ("'H100'", "has 0")),
    ({"gpu_filter": "L4", "region": "us-west-2"}, ("g6.xlarge", "us-west-2", "us-east-1")),
]


@pytest.mark.parametrize(("asked", "pieces"), MISSES)
def test_where_nothing_fits_the_nearest_say_why_with_both_numbers(rows, asked, pieces):
    found, excluded = select(rows, MachineRequest(**asked))
    assert not found
    assert 1 <= len(excluded) <= 10
    first = f"{excluded[0].name}: {excluded[0].reason}"
    for piece in pieces:
        assert piece in first, first
    assert len({miss.name for miss in excluded}) == len(excluded)


def test_every_reason_is_given_and_fewest_come_first(rows):
    asked = MachineRequest(gpu_count=4, gpu_filter="A100-80GB", max_price=10.0, region="us-west-2")
    _, excluded = select(rows, asked)
    counts = [miss.reason.count(";") + 1 for miss in excluded]
    assert counts == sorted(counts)
    assert excluded[0].name == "aws us-west-2 p4de.24xlarge"  # too dear alone; Lambda's is elsewhere too
    lambdas = next(miss.reason for miss in excluded if "gpu_8x" in miss.name)
    assert "$14.32" in lambdas and "us-west-2 asked" in lambdas


def test_machines_without_gpus_are_the_last_of_the_misses(rows):
    """However cheap they are, and whatever else is wrong with those that have some."""
    asked = MachineRequest(gpu_count=2, gpu_filter="H100", max_price=1.0, min_ram_bytes=1)
    _, excluded = select(rows, asked, max_misses=1000)
    gpus = [next(row for row in rows if row.name == miss.name).gpu_count for miss in excluded]
    assert gpus[0] > 0
    assert 0 in gpus
    assert gpus.index(0) == len(gpus) - gpus.count(0)
    _, excluded = select(rows, MachineRequest(gpu_count=0, max_price=0.01))
    assert excluded[0].name == "aws us-east-1 m6i.2xlarge"


def oracle(request: MachineRequest) -> list[tuple[float, str, str, str]]:
    """The CSVs' own numbers, compared one by one: each type with GPUs that fits, at its cheapest place."""
    mib_bytes = {81920: 80 * GIB, 40960: 40 * GIB, 22888: 24 * GB, 80: 80 * GIB, 24: 24 * GIB}
    best: dict[tuple[str, str], tuple[float, str, str, str]] = {}
    for cloud, rows in CSVS.items():
        for kind, gpu, count, _cpus, gib, mib, price, _spot, region, _zone, arch in rows:
            if price == "" or arch == "arm64" or "Radeon" in gpu or count in ("", 0.125):
                continue
            kind_asked = bool(request.gpu_filter) or request.min_vram_bytes > 0
            wanted = request.gpu_count if request.gpu_count is not None else (1 if kind_asked else 0)
            if wanted:
                if (request.gpu_filter or "").lower() not in gpu.lower() or count < wanted:
                    continue
                if mib_bytes[mib] < request.min_vram_bytes:
                    continue
            if gib * GIB < request.min_ram_bytes or gib * GIB < request.needed_ram_bytes:
                continue
            if request.max_price is not None and price > request.max_price:
                continue
            if request.region is not None and request.region != region:
                continue
            place = (price, cloud, region, kind)
            best[cloud, kind] = min(best.get((cloud, kind), (math.inf, "", "", "")), place)
    return sorted(best.values())


REQUESTS = st.builds(
    MachineRequest,
    gpu_count=st.sampled_from([None, 0, 1, 2, 4, 8]),
    gpu_filter=st.sampled_from([None, "A100", "a100-80gb", "L4", "H100", "80"]),
    min_vram_bytes=st.sampled_from([0, 24 * GB, 40 * GB, 80 * GB, 85_899_345_920, 85_899_345_921]),
    min_ram_bytes=st.sampled_from([0, 16 * GIB, 160 * GIB, 160 * GIB + 1, 1800 * GIB]),
    needed_ram_bytes=st.sampled_from([0, 48 * GIB, 400 * GIB + 1]),
    max_price=st.sampled_from([None, 0.5, 1.29, 2.58, 3.28, 14.319, 14.32, 40.0]),
    region=st.sampled_from([None, "us-east-1", "us-west-2", "US", "nowhere"]),
)


@settings(max_examples=400, deadline=None)
@given(request_=REQUESTS)
def test_select_is_the_oracles(rows, request_):
    found, excluded = select(rows, request_)
    expected = oracle(request_)
    # Machines without GPUs are thinned out, so they are another test's.
    got = [
        (one.row.price_per_hour, one.row.cloud, one.row.region, one.row.instance_type) for one in found if one.row.gpus
    ]
    assert got == expected
    assert bool(found) != bool(excluded)
    assert [one.offer.price_per_hour for one in found] == sorted(one.offer.price_per_hour for one in found)


# What SkyPilot makes of it


def test_skypilots_own_optimizer_finds_our_cheapest(real, rows):
    for name, count, (cloud, kind, price) in real["optimized"]:
        exactly = [row for row in rows if row.gpu and row.gpu.name == name and row.gpu_count == count]
        found, _ = select(exactly, MachineRequest(gpu_count=count, gpu_filter=name))
        first = found[0].row
        assert (first.cloud, first.instance_type, first.price_per_hour) == (cloud, kind, price)


def test_every_offer_is_a_machine_that_skypilot_would_launch_at_that_price(real, rows):
    for asked, launchable in real["launchable"].items():
        name, _, count = asked.partition(":")
        found, _ = select(rows, MachineRequest(gpu_count=int(count), gpu_filter=name, max_price=41.0))
        assert launchable == [[one.row.cloud, one.row.instance_type, one.row.price_per_hour] for one in found]


def test_what_is_launched_ends_by_itself_and_costs_no_more(real):
    resources = real["task"]["resources"]
    assert resources["autostop"] == {"idle_minutes": 31, "down": True, "wait_for": "none"}
    assert resources["max_hourly_cost"] == 20
    assert resources["use_spot"] is False
    assert (resources["infra"], resources["instance_type"]) == ("runpod/US", "2x_A100-80GB_SECURE")
    assert "run" not in real["task"] and not real["task"]["file_mounts"]


def test_the_request_carries_the_end_the_identities_and_no_usage_collection(real):
    """What reaches SkyPilot's server: seen by one that only writes it down."""
    (body,) = real["launches"]
    assert body["cluster_name"] == "abc"
    for line in ("idle_minutes: 31", "down: true", "wait_for: none"):
        assert line in body["task"], body["task"]
    assert body["env_vars"]["SKYPILOT_DISABLE_USAGE_COLLECTION"] == "1"
    sent = {cloud: part for cloud, part in body["override_skypilot_config"].items() if "remote_identity" in part}
    assert sent == real["identities"]["runpod"]
    (renewal,) = real["renewals"]
    assert (renewal["idle_minutes"], renewal["down"], renewal["wait_for"]) == (2, True, "none")


def test_no_key_of_another_cloud_is_copied(real):
    """Read from the file by which SkyPilot provisions; without our settings it copies them, so the test can fail."""
    assert real["copied_without"] == [".aws", ".azure", "vast_api_key", ".runpod"]
    # Without RunPod's own the machine could not end itself.
    assert real["copied"] == [".runpod"]
    own = {cloud: settings.get(cloud, {}).get("remote_identity") for cloud, settings in real["identities"].items()}
    assert own == {
        "aws": "SERVICE_ACCOUNT", "gcp": "SERVICE_ACCOUNT", "lambda": None, "runpod": None, "slurm": "NO_UPLOAD",
        "vast": "LOCAL_CREDENTIALS",
    }  # fmt: skip
    others = {value["remote_identity"] for cloud, value in real["identities"]["aws"].items() if cloud != "aws"}
    assert others == {"NO_UPLOAD"}


def test_a_key_that_goes_along_is_told(real):
    going = {cloud for cloud, settings in real["identities"].items() if own_key_travels(cloud, settings)}
    assert going == {"lambda", "runpod", "vast"}
    assert "your key of runpod goes along to abc, which could not end itself without" in real["log"]


def test_a_key_that_skypilot_would_copy_all_the_same_refuses_the_launch(real):
    assert real["travelling"] == []
    assert real["travelling_others"] == ["~/.lambda_cloud/lambda_keys"]
    kind, message = real["refused"]
    assert kind == "PlanRefused" and "~/.lambda_cloud/lambda_keys" in message
    assert real["taken_when_refused"] == []


def test_skypilots_errors_are_ours(real):
    kinds, messages = zip(*real["errors"], strict=True)
    assert kinds == (
        "PlanRefused", "PlanRefused", "MachineLost", "MachineLost", "JobFailed", "JobFailed", "MachineLost",
    )  # fmt: skip
    assert "quota of 0 vCPUs" in messages[0] and "sky check" in messages[0] and "sky check" in messages[1]
    assert messages[5].endswith("could not") and messages[6] == "ours"
    assert real["unanswered"][0] in ("JobFailed", "MachineLost")


def test_the_users_own_files_are_untouched_and_no_server_is_left(real):
    assert real["untouched"]
    assert real["servers"] == []


def test_skypilot_is_not_imported_before_it_is_needed():
    code = """
        import sys
        import outliers.machines, outliers.machines.catalog, outliers.machines.sky_engine
        loaded = [name for name in sys.modules if name == "sky" or name.startswith("sky.")]
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)
