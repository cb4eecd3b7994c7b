"""The health check of a container: its worker's own answer, on a real port; a run's container has no worker."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading

import pytest

from tests.support.prefect_home import ROOT
from tests.support.s3 import free_ports


class Worker(http.server.BaseHTTPRequestHandler):
    """Answers as Prefect's worker does: 200 while it polls, 503 where it has not for a while."""

    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


class Stuck(Worker):
    status = 503


def asked(port: int, *options: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "flows.server.alive", *options]
    known = {"PATH": "/usr/bin:/bin", "PREFECT_WORKER_WEBSERVER_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    done = subprocess.run(command, cwd=ROOT, env=known | environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("worker", "code", "words"), [(Worker, 0, "healthy"), (Stuck, 1, "503")])
def test_it_is_as_healthy_as_its_worker_whatever_proxy_is_set(worker, code, words):
    with http.server.HTTPServer(("127.0.0.1", 0), worker) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        found, said = asked(server.server_port)
        server.shutdown()
    assert (found, words in said) == (code, True), said


def test_without_a_worker_it_is_sick_but_not_where_it_runs_one_study():
    (port,) = free_ports(1)
    code, said = asked(port)
    assert (code, "--with-healthcheck" in said) == (1, True), said
    assert asked(port, PREFECT__FLOW_RUN_ID="0b5ef4a4") == (0, "healthy\n")


def test_a_gpu_container_without_the_driver_is_sick_in_a_run_too(tmp_path):
    code, said = asked(1, "--gpu", PREFECT__FLOW_RUN_ID="0b5ef4a4", PATH=str(tmp_path))
    assert (code, "--gpus all" in said) == (1, True), said
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    driver.chmod(0o755)
    assert asked(1, "--gpu", PREFECT__FLOW_RUN_ID="0b5ef4a4", PATH=str(tmp_path)) == (0, "healthy\n")
