"""A webhook on loopback hears of a run that fails, once, from a real server with the automation that a person sets up."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading

import pytest

from tests.support.held_job import until
from tests.support.prefect_home import ROOT

pytestmark = pytest.mark.servers


@pytest.fixture
def webhook():
    """(address, what came: content type and body)."""
    heard: list[tuple[str, dict]] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/services/T0/B0/secret", heard
        server.shutdown()


def set_up(prefect_home, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.server.notify"]
    environment = prefect_home.client_environment()
    return subprocess.run(
        command, cwd=ROOT, env=environment, input=address, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.studies
def test_a_run_that_fails_is_told_once_and_one_that_is_done_is_not(prefect_home, webhook, tmp_path):
    address, heard = webhook
    for word in ("made", "replaced"):
        done = set_up(prefect_home, f"{address}\n")
        assert (done.returncode, word in done.stdout) == (0, True), done.stderr
        assert "secret" not in done.stdout + done.stderr
    flow_run = prefect_home.run(
        name='nightly, with a "quote"', model="builtin:nosuch", compute={"workspace": str(tmp_path / "workspace")}
    )
    prefect_home.wait(flow_run, "Failed")
    until(lambda: heard, "the message", poll_seconds=0.2)
    ((kind, message),) = heard
    assert kind == "application/json"
    assert message["text"].startswith("nightly, with a \"quote\" Failed: 'builtin:nosuch' is not built in; built in: ")
    assert message["text"].endswith(f"/runs/flow-run/{flow_run}")


@pytest.mark.parametrize(
    "given", ["", "hooks.example.org/secret", "ftp://example.org/secret", "http://a/secret http://b"]
)
def test_what_is_no_address_is_refused_and_not_shown(prefect_home, given):
    done = set_up(prefect_home, given)
    assert (done.returncode, done.stdout) == (2, "")
    assert "http:// or https://" in done.stderr
    assert "secret" not in done.stderr
