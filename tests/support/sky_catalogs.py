"""SkyPilot's catalogs as CSV files written by hand: what its clouds offer in the tests, and how each of them writes it."""

from __future__ import annotations

import csv
from pathlib import Path

COLUMNS = (
    "InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "MemoryGiB", "GpuInfo", "Price", "SpotPrice", "Region",
    "AvailabilityZone", "Arch",
)  # fmt: skip

# (type, GPU, count, processors, GiB, SizeInMiB as that cloud writes it, price, spot price, region, zone, architecture)
CSVS = {
    "aws": [
        ("p4de.24xlarge", "A100-80GB", 8, 96, 1152, 81920, 40.96, 12.0, "us-east-1", "a", "x86_64"),
        # the same in another zone, and dearer and cheaper regions
        ("p4de.24xlarge", "A100-80GB", 8, 96, 1152, 81920, 40.96, 11.0, "us-east-1", "b", "x86_64"),
        ("p4de.24xlarge", "A100-80GB", 8, 96, 1152, 81920, 39.5, 11.0, "us-west-2", "a", "x86_64"),
        ("p4d.24xlarge", "A100", 8, 96, 1152, 40960, 32.77, 9.0, "us-east-1", "a", "x86_64"),
        # AWS writes 24 times 10^9 bytes as 22888 MiB, cut off
        ("g6.xlarge", "L4", 1, 4, 16, 22888, 0.8048, 0.3, "us-east-1", "a", "x86_64"),
        ("g6.12xlarge", "L4", 4, 48, 192, 22888, 4.6016, 1.5, "us-east-1", "a", "x86_64"),
        # an eighth of a card, a card without CUDA, an arm64 host, one on spot only: none is offered
        ("g6f.large", "L4", 0.125, 2, 8, 2861, 0.2, 0.1, "us-east-1", "a", "x86_64"),
        ("g4ad.xlarge", "Radeon Pro V520", 1, 4, 16, 8192, 0.37, 0.1, "us-east-1", "a", "x86_64"),
        ("g5g.xlarge", "T4g", 1, 4, 8, 16384, 0.42, 0.1, "us-east-1", "a", "arm64"),
        ("p5.48xlarge", "H100", 8, 192, 2048, 81920, "", 20.0, "us-east-1", "a", "x86_64"),
        ("m6i.2xlarge", "", "", 8, 32, "", 0.384, 0.1, "us-east-1", "a", "x86_64"),
        ("m6i.2xlarge", "", "", 8, 32, "", 0.4, 0.1, "eu-west-1", "a", "x86_64"),
        # beaten: dearer, and not larger in anything
        ("m5.2xlarge", "", "", 8, 32, "", 0.385, 0.1, "us-east-1", "a", "x86_64"),
        ("r6i.2xlarge", "", "", 8, 64, "", 0.504, 0.1, "us-east-1", "a", "x86_64"),
        ("m7g.2xlarge", "", "", 8, 32, "", 0.2, 0.1, "us-east-1", "a", "arm64"),
    ],
    "lambda": [
        ("gpu_8x_a100_80gb_sxm4", "A100-80GB", 8, 240, 1800, 81920, 14.32, "", "us-east-1", "", ""),
        ("gpu_1x_a100_sxm4", "A100", 1, 30, 200, 40960, 1.29, "", "us-east-1", "", ""),
        ("gpu_2x_a100", "A100", 2, 60, 400, 40960, 2.58, "", "us-west-1", "", ""),
    ],
    "runpod": [
        # RunPod writes GB where MiB is said
        ("2x_A100-80GB_SECURE", "A100-80GB", 2, 16, 160, 80, 3.28, 2.0, "US", "US-TX-1", ""),
        ("1x_A100-80GB_SECURE", "A100-80GB", 1, 8, 80, 80, 1.64, 1.0, "US", "US-TX-1", ""),
        # as dear as Lambda's pair of 40 GB: the name decides
        ("2x_L4_COMMUNITY", "L4", 2, 16, 48, 24, 2.58, 0.3, "CA", "CA-MTL-1", ""),
    ],
}  # fmt: skip


def write_catalogs(home: Path) -> None:
    folder = home / ".sky" / "catalogs" / "v8"
    for cloud, rows in CSVS.items():
        (folder / cloud).mkdir(parents=True)
        with (folder / cloud / "vms.csv").open("w", newline="") as file:
            # Only AWS tells the architecture, and Lambda has no zones.
            columns = {"aws": 11, "runpod": 10, "lambda": 9}[cloud]
            writer = csv.writer(file)
            writer.writerow(COLUMNS[:columns])
            for kind, gpu, count, cpus, gib, mib, *rest in rows:
                card = {"Name": gpu, "Manufacturer": "NVIDIA", "Count": count, "MemoryInfo": {"SizeInMiB": mib}}
                info = str({"Gpus": [card], "TotalGpuMemoryInMiB": mib}) if gpu else ""
                writer.writerow((kind, gpu, count, cpus, gib, info, *rest)[:columns])
    (folder / "common").mkdir()
    names = sorted({row[1] for rows in CSVS.values() for row in rows} - {""})
    with (folder / "common" / "accelerators.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("AcceleratorName", "Clouds"), *((name, str(["AWS", "Lambda", "RunPod"])) for name in names)]
        )
    (folder / "common" / "metadata.csv").write_text("GPU,MemoryGB,Manufacturer\n")
