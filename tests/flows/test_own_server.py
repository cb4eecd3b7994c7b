"""Prefect's server of one command: when it is started, that it ends with its command, and what is said where it can't start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.cli import inprocess
from flows.server.own import is_decided, startup_seconds
from outliers.errors import BadInput
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.hub_server import wait_until

ROOT = Path(__file__).resolve().parents[2]

COMMAND = """
import json, sys, time
from pathlib import Path
from flows.cli.inprocess import settle_prefect
server = settle_prefect(Path(sys.argv[1]))
server.wait()
print(json.dumps({"url": server.url, "pid": server._process.pid}), flush=True)
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(json.dumps([str(client.api_url), client.hello().status_code]), flush=True)
if sys.argv[2:] == ["end"]:
    sys.exit()
time.sleep(600)
"""


def start(root, *words, **environment):
    """A process that starts a server as the command does, below `root`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(root), *words],
        env=kept | {"HOME": str(root), "PYTHONPATH": str(ROOT), **environment},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.servers
def test_it_answers_on_loopback_alone_and_ends_with_its_command_however_that_ends(tmp_path):
    """Once by itself, once by a signal that nothing can catch; what it knows is there the second time."""
    for words in (("end",), ()):
        with start(tmp_path, *words) as process:
            told = json.loads(process.stdout.readline())
            assert json.loads(process.stdout.readline()) == [told["url"] + "/", 200]
            if not words:
                with urllib.request.urlopen(told["url"] + "/health") as answer:
                    assert json.load(answer) is True
                heard = [c for c in psutil.Process(told["pid"]).net_connections() if c.status == psutil.CONN_LISTEN]
                assert {connection.laddr.ip for connection in heard} == {"127.0.0.1"}
                process.send_signal(signal.SIGKILL)
            process.wait(60)
        try:
            wait_until(lambda pid=told["pid"]: is_gone(pid))
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(told["pid"]).kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefect"], "the home folder is left alone"
    assert (tmp_path / "prefect" / "prefect.db").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, "workspace/prefect"),
        ({"PREFECT_HOME": "~/of mine"}, "of mine"),
        ({"PREFECT_API_URL": ""}, ".prefect"),  # Prefect takes an empty address for none
    ],
)
def test_its_history_is_where_prefect_keeps_its_own(tmp_path, monkeypatch, given, place):
    for name in [name for name in os.environ if name.startswith("PREFECT")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ) | given | {"HOME": str(tmp_path)})
    monkeypatch.chdir(tmp_path)
    homes = []
    monkeypatch.setattr(inprocess, "OwnServer", lambda home, give_up: homes.append(home))
    inprocess.settle_prefect(tmp_path / "workspace")
    assert homes == [tmp_path / place]


@pytest.mark.servers
@pytest.mark.studies
def test_a_server_that_can_not_start_says_why(tmp_path):
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "prefect.db").write_bytes(b"not a database, and not empty either")
    (tmp_path / "prefect" / "server.log").write_text("of yesterday\n")
    with start(tmp_path) as process:
        _, said = process.communicate(timeout=120)
    last = said[said.rindex("JobFailed") :]
    assert "Prefect's server ended with 3" in last
    assert "file is not a database" in last
    assert str(tmp_path / "prefect" / "server.log") in last
    assert "of yesterday" not in last
    assert "make ui" in last


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", 120),
        ("7", 7),
        (" 7 ", 7),
        *((text, None) for text in ("soon", "0", "-1", "1.5", "nan", "inf", "1e3", "9" * 5000)),
    ],
)
def test_the_time_of_its_start_is_a_number_of_seconds(monkeypatch, text, seconds):
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", text)
    if seconds is not None:
        assert startup_seconds() == seconds
        return
    with pytest.raises(
        BadInput, match=r"STARTUP_TIMEOUT_SECONDS is .*: it must be a whole number of seconds, 1 or more"
    ):
        startup_seconds()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "soon"),
        pytest.param("PREFECT_CLIENT_MAX_RETRIES", "many", marks=pytest.mark.studies),
    ],
)
def test_a_setting_that_is_none_is_refused_by_the_command(tmp_path, name, value):
    model = tiny.make_model(tmp_path / "model", "Llama", hidden_size=64, num_hidden_layers=8)
    kept = {key: text for key, text in os.environ.items() if not key.startswith("PREFECT")}
    options = ["--model", str(model), "--workspace", str(tmp_path / "w"), "--corpus", "builtin:python-docs"]
    words = ("study", *options, "--num-sequences", "2", "--sequence-length", "32")
    done = run_command(tmp_path, *words, environment=kept | {"HOME": str(tmp_path), name: value})
    assert done.returncode == 2, done.stderr
    assert "refused: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "w").glob("captures/*")), "nothing was run"


DECIDED = [
    ({}, {}, False),
    ({"PREFECT_LOGGING_LEVEL": "DEBUG"}, {}, False),
    ({"PREFECT_API_URL": "http://127.0.0.1:4200/api"}, {}, True),
    ({"PREFECT_PROFILE": "mine"}, {}, True),
    ({"PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}, {}, True),
    # leave to start one names none: it is ours, which has a door
    ({"PREFECT_SERVER_EPHEMERAL_ENABLED": "true"}, {}, False),
    ({}, {"home/profiles.toml": 'active = "mine"'}, True),
    (
        {},
        {
            "home/profiles.toml": 'active = "ephemeral"\n[profiles.ephemeral]\nPREFECT_SERVER_ALLOW_EPHEMERAL_MODE = "true"'
        },
        False,
    ),
    ({}, {"home/profiles.toml": '[profiles.mine]\nPREFECT_API_URL = "http://127.0.0.1:4200/api"'}, False),
    ({"PREFECT_PROFILE": "mine"}, {"home/profiles.toml": '[profiles.mine]\nPREFECT_API_KEY = "x"'}, True),
    ({}, {"home/profiles.toml": 'active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://127.0.0.1:4200/api"'}, True),
    ({}, {"home/profiles.toml": 'active = "a"\n[profiles.a]\nPREFECT_SERVER_EPHEMERAL_ENABLED = "false"'}, True),
    ({}, {"home/profiles.toml": 'active = "a"\n[profiles.a]\nPREFECT_SERVER_EPHEMERAL_ENABLED = false'}, True),
    ({}, {"home/profiles.toml": "not TOML"}, True),
    ({}, {"home/profiles.toml": "profiles = 1"}, True),
    ({}, {"prefect.toml": "[api]"}, True),
    ({}, {".env": "prefect_api_url=http://127.0.0.1:4200/api"}, True),
    ({}, {"prefect.toml": "[logging]\nlevel = 'DEBUG'"}, False),
    ({}, {".env": "OTHER=1"}, False),
    ({}, {".env": "API=1\nPREFECT_LOGGING_LEVEL=DEBUG"}, False),
    ({}, {"pyproject.toml": "[tool.prefect.api]\nurl = 'http://127.0.0.1:4200/api'"}, True),
    ({}, {"pyproject.toml": "[project]\nname = 'other'"}, False),
    ({}, {"pyproject.toml": "not TOML"}, True),
]


@pytest.mark.parametrize(("environment", "files", "expected"), DECIDED)
def test_whoever_has_told_prefect_of_a_server_gets_none_of_ours(tmp_path, monkeypatch, environment, files, expected):
    for name in [name for name in os.environ if name.startswith("PREFECT")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert is_decided(tmp_path / "home") is expected


def test_what_prefect_reads_is_what_is_looked_at():
    """The settings of the installed Prefect come from these files, and those names are settings of it."""
    from prefect.settings import Settings, get_current_settings
    from prefect.settings import sources as read

    text = Path(read.__file__).read_text("utf-8")
    assert "pyproject.toml" in text
    assert "prefect.toml" in text
    assert Settings.model_config["env_file"] == ".env"
    assert get_current_settings().profiles_path.name == "profiles.toml"
