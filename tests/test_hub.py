"""Names of the hub, asked of a server on loopback that answers as the hub does: commit, private, gated, missing, broken."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWERS = {
    # path: (status, the hub's error code, body)
    "/api/models/org/open/revision/main": (200, None, {"id": "org/open", "sha": COMMIT, "private": False}),
    "/api/models/org/open/revision/v9": (404, "RevisionNotFound", {}),
    "/api/models/org/gated/revision/main": (403, "GatedRepo", {}),
    "/api/models/org/missing/revision/main": (401, "RepoNotFound", {}),
    "/api/models/org/broken/revision/main": (500, None, {}),
    "/api/datasets/org/texts/revision/main": (
        200,
        None,
        {"id": "org/texts", "sha": COMMIT, "private": False, "gated": False},
    ),
    "/api/datasets/org/own/revision/main": (200, None, {"id": "org/own", "sha": COMMIT, "private": True}),
    "/api/datasets/org/asks/revision/main": (
        200,
        None,
        {"id": "org/asks", "sha": COMMIT, "private": False, "gated": "auto"},
    ),
}


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, code, body = ANSWERS.get(self.path.split("?")[0], (404, "RepoNotFound", {}))
        content = json.dumps(body).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def ask(endpoint, tmp_path, kind, name, revision=None):
    """What `resolve` says, in a process whose hub is `endpoint`: (commit, public) or (error's class, message)."""
    script = (
        "import json, sys\n"
        "from outliers.errors import OutliersError, UnknownModel\n"
        "from outliers.hub import resolve\n"
        "kind, name, revision = json.loads(sys.argv[1])\n"
        "try:\n"
        "    found = resolve(kind, name, revision, UnknownModel)\n"
        "    print(json.dumps([found.commit, found.public]))\n"
        "except OutliersError as error:\n"
        "    print(json.dumps([type(error).__name__, str(error)]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([kind, name, revision])],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "name", "revision", "expected"),
    [
        ("model", "org/open", None, [COMMIT, True]),
        ("model", "org/open", "v9", ["UnknownModel", "org/open has no revision 'v9'"]),
        (
            "model",
            "org/gated",
            None,
            ["UnknownModel", "org/gated is gated: accept its terms on the hub and set HF_TOKEN"],
        ),
        ("model", "org/missing", None, ["UnknownModel", "no model of the hub that this account may see"]),
        ("model", "org/broken", None, ["HubUnavailable", "the hub did not answer"]),
        ("dataset", "org/texts", None, [COMMIT, True]),
        # text that not everybody may read is not published unasked
        ("dataset", "org/own", None, [COMMIT, False]),
        ("dataset", "org/asks", None, [COMMIT, False]),
        ("dataset", "org/none", None, ["UnknownModel", "no dataset of the hub that this account may see"]),
    ],
)
def test_what_a_name_is(hub, tmp_path, kind, name, revision, expected):
    found = ask(hub, tmp_path, kind, name, revision)
    assert found[0] == expected[0]
    if isinstance(expected[1], bool):
        assert found[1] is expected[1]
    else:
        assert expected[1] in found[1]


def test_a_hub_that_is_not_there_is_transient(tmp_path):
    kind, message = ask("http://127.0.0.1:9", tmp_path, "model", "org/open")
    assert kind == "HubUnavailable"
    assert "did not answer" in message
