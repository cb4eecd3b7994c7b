"""`outliers plan|study --provider sky` as a user types them, with a HOME of its own and no way to any network."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import psutil
import pytest

from tests.support import tiny
from tests.support.commands import run_command
from tests.support.sky_catalogs import write_catalogs

pytestmark = pytest.mark.servers

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--corpus", "builtin:python-docs", "--num-sequences", "1", "--sequence-length", "16")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """Runs a command on a tiny model; what it did."""
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: pip install -e '.[sky]'")
    home = tmp_path_factory.mktemp("home")
    write_catalogs(home)
    model = tiny.make_model(home / "model", "Llama")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SKY", "AWS", "AZURE", "GOOGLE"))}
    kept |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOBODY)
    kept |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "OUTLIERS_WORKSPACE": str(home / "work space")}

    def run(verb, *words):
        asked = (verb, "--provider", "sky", "--model", model, *SMALL, *words)
        return run_command(home, *asked, environment=kept, timeout=240)

    run.home = home
    return run


def test_a_plan_as_json_is_json_also_where_catalogs_are_fetched(outliers):
    """SkyPilot tells a server how far it is with that, on standard output."""
    done = outliers("plan", "--gpu-count", "1", "--gpu-filter", "L4", "--disk", "500", "--json")
    assert done.returncode == 0, done.stderr
    assert {offer["provider"] for offer in json.loads(done.stdout)["offers"]} == {"sky"}
    assert "Updating" not in done.stderr
    assert "the catalog of azure can't be read" in done.stderr  # one was to be fetched
    said = " ".join(done.stderr.split())
    assert "a disk of 560 GB is asked for: what it costs is not in SkyPilot's catalog" in said


def test_a_study_that_is_refused_starts_no_server(outliers):
    done = outliers("study", "--upload-model", "--gpu-count", "2", "--max-price", "0.001")
    assert done.returncode == 2
    assert "(--max-price)" in done.stderr
    assert not (outliers.home / ".sky" / "api_server").exists()
    running = [
        one.pid
        for one in psutil.process_iter(["cmdline"])
        if "sky.server" in " ".join(one.info["cmdline"] or ()) and one.environ().get("HOME") == str(outliers.home)
    ]
    assert running == []
