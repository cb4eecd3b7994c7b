"""What SkyPilot does with the tests' catalogs: run in a process and a HOME of its own, it prints a report for `test_sky`.

Before it: `sky_catalogs`, which writes what HOME holds. The order matters: clouds are asked for before any is enabled,
and keys appear one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import io
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from outliers import errors
from outliers.machines import catalog, sky_engine
from outliers.machines.base import MachineRequest

HOME = Path.home()
KEYS = (".aws/credentials", ".azure/msal_token_cache.json", ".config/vastai/vast_api_key", ".runpod/config.toml")
ASKED = (("A100-80GB", 2), ("A100-80GB", 8), ("A100", 8), ("A100", 2), ("L4", 1), ("L4", 4))
QUIET = contextlib.redirect_stdout(io.StringIO())


def enable_clouds(sky) -> None:
    from sky import check, global_user_state
    from sky.clouds.cloud import CloudCapability

    global_user_state.set_enabled_clouds(["AWS", "Lambda", "RunPod"], CloudCapability.COMPUTE, "default")
    global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds("default"), "default")


def best(sky, resources) -> list[Any]:
    """What SkyPilot's own optimizer takes: cloud, type, price an hour."""
    from sky import optimizer

    with sky.Dag() as dag:
        sky.Task(name="x").set_resources(resources)
    with QUIET:
        chosen = optimizer.Optimizer.optimize(dag, quiet=True).tasks[0].best_resources
    return [str(chosen.cloud).lower(), chosen.instance_type, round(chosen.get_cost(3600), 6)]


def copied(sky, wanted, settings) -> list[str]:
    """Keys that SkyPilot would copy to a machine, by the file it provisions by."""
    from sky.backends import backend_utils

    launchable = sky_engine.resources(wanted, 1_800).copy(accelerators=None)
    with sky_engine._configured(settings), QUIET:
        made = backend_utils.write_cluster_config(
            launchable, 1, "runpod-ray.yml.j2", "abc", HOME / "x.whl", "hash", sky.clouds.Region("US"),
            [sky.clouds.Zone("US-TX-1")], dryrun=True,
        )  # fmt: skip
    mounts = Path(made["ray"]).read_text().split("file_mounts:")[1].split("}")[0]
    return [name for name in (".aws", ".azure", "vast_api_key", ".runpod") if name in mounts]


def raised(work) -> list[str] | None:
    try:
        work()
    except errors.OutliersError as error:
        return [type(error).__name__, str(error)]
    return None


def taking_server(sky) -> list[tuple[str, Any]]:
    """In place of SkyPilot's server: it takes a launch down, and answers nothing. What it took, as it comes."""
    from sky.server import common, constants

    taken: list[tuple[str, Any]] = []
    version = str(constants.API_VERSION)

    class Server(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            taken.append((self.path, json.loads(body or b"{}")))
            healthy = self.path.startswith("/api/health")
            told = {"status": "healthy", "api_version": version, "version": sky.__version__, "commit": sky.__commit__}
            text = json.dumps(told).encode() if healthy else b"{}"
            self.send_response(200 if healthy or "/api/" not in self.path else 404)
            self.send_header("X-Skypilot-Request-ID", "1")
            self.send_header("X-SkyPilot-API-Version", version)
            self.send_header("X-SkyPilot-Version", sky.__version__)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["SKYPILOT_API_SERVER_LOCAL_PORT"] = str(server.server_port)
    for cached in (common.get_server_url, common.is_api_server_local):
        cached.cache_clear()
    return taken


def translated(error: Exception) -> list[str] | None:
    def work():
        with sky_engine._translated("abc"):
            raise error

    return raised(work)


def what_fits(sky, rows) -> dict[str, Any]:
    def launchable(name, count):
        found, _ = catalog.select(rows, MachineRequest(gpu_count=count, gpu_filter=name, max_price=41.0))
        return [best(sky, sky_engine.resources(one, 1_800)) for one in found]

    return {
        "optimized": [[name, count, best(sky, sky.Resources(accelerators={name: count}))] for name, count in ASKED],
        "launchable": {f"{name}:{count}": launchable(name, count) for name, count in ASKED},
    }


def what_is_copied(sky, wanted) -> dict[str, Any]:
    """Keys of several clouds are on this side."""
    for path in KEYS:
        (HOME / path).parent.mkdir(parents=True, exist_ok=True)
        (HOME / path).write_text("canary")
    return {
        "copied_without": copied(sky, wanted, {}),
        "copied": copied(sky, wanted, sky_engine.identities("runpod")),
        "travelling": sky_engine.travelling_keys("runpod"),
    }


def unreachable() -> Any:
    """What is said where catalogs are to be fetched and nobody answers."""
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    before = dict(os.environ)
    os.environ.update(proxies)
    try:
        return raised(lambda: catalog.read_rows(("azure", "vast")))
    finally:
        os.environ.clear()
        os.environ.update(before)


def what_is_launched(sky, wanted) -> dict[str, Any]:
    """The last: from here on SkyPilot's server is ours."""
    key = HOME / ".lambda_cloud" / "lambda_keys"
    key.parent.mkdir()
    key.write_text("api_key = canary")
    report: dict[str, Any] = {"travelling_others": sky_engine.travelling_keys("runpod")}
    taken = taking_server(sky)
    report["no_rows"] = raised(lambda: catalog.candidates(MachineRequest(), ["kubernetes"]))
    report["unreachable"] = unreachable()
    report["refused"] = raised(lambda: sky_engine.launch("abc", wanted, 1_801))
    report["taken_when_refused"] = [path for path, _ in taken if path == "/launch"]
    key.unlink()
    report["unanswered"] = raised(lambda: sky_engine.launch("abc", wanted, 1_801))
    report["launches"] = [body for path, body in taken if path == "/launch"]
    with contextlib.suppress(errors.OutliersError):
        sky_engine.renew("abc", 61)
    report["renewals"] = [body for path, body in taken if path == "/autostop"]
    return report


def what_goes_wrong(sky) -> list[Any]:
    known = sky.exceptions
    raised_there = (
        known.ResourcesUnavailableError("no capacity", failover_history=[RuntimeError("quota of 0 vCPUs")]),
        known.NoCloudAccessError("none"),
        known.ClusterDoesNotExist("no abc"),
        known.RequestCancelled("x"),
        known.ClusterSetUpError("pip"),
        RuntimeError("\x1b[33mcould not\x1b[0m"),
        errors.MachineLost("ours"),
    )
    return [translated(error) for error in raised_there]


def main() -> None:
    logging.getLogger("outliers").addHandler(logging.StreamHandler())
    logging.getLogger("outliers").setLevel(logging.INFO)
    report: dict[str, Any] = {"enabled_before": catalog.enabled_clouds()}
    report["database_before"] = (HOME / ".sky/state.db").exists()
    rows = catalog.read_rows(["aws", "lambda", "runpod"])
    report["rows"] = [dataclasses.asdict(row) for row in rows]
    sky = catalog.import_sky()
    enable_clouds(sky)
    report["enabled_after"] = catalog.enabled_clouds()
    report |= what_fits(sky, rows)
    request = MachineRequest(gpu_count=2, gpu_filter="A100-80GB", max_price=20.0)
    wanted = catalog.select(rows, request)[0][0]
    report["task"] = sky_engine.task(wanted, 1_801).to_yaml_config()
    clouds = ("aws", "gcp", "lambda", "runpod", "slurm", "vast")
    report["identities"] = {cloud: sky_engine.identities(cloud) for cloud in clouds}
    report |= what_is_copied(sky, wanted)
    report |= what_is_launched(sky, wanted)
    report["errors"] = what_goes_wrong(sky)
    sys.__stdout__.write("\nREPORT" + json.dumps(report))


if __name__ == "__main__":
    main()
