"""Names of the hub, asked of a server on loopback that answers as the hub does: commit, private, gated, missing, broken."""

from __future__ import annotations

import json
import logging
import time

import pytest

from outliers.errors import HubUnavailable
from outliers.hub.client import HubFile, Patience, needed_files, retry_after_seconds, tries_in_a_row
from tests.support.commands import run_program
from tests.support.hub_server import Fault, Repo, client_environment, commit_id, hub_server

COMMIT = commit_id("first")
INDEX, SHARDS = "model.safetensors.index.json", ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
SECRET = "hf_theSecretOfThisTest"
MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"w" * 700}


def repo(kind, name, files=None, **more):
    return Repo(kind, name, {COMMIT: files or MODEL}, {"main": COMMIT}, **more)


@pytest.fixture(scope="module")
def hub():
    repos = [
        repo("models", "org/open"),
        repo("models", "org/unlisted", listed=False),
        repo("models", "org/gated", gated="manual", tokens=(SECRET,)),
        repo("models", "org/own", private=True, tokens=(SECRET,)),
        repo("models", "org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}),
        repo("models", "org/adapted", MODEL | {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"}),
        repo("models", "org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"}),
        repo("models", "org/GGUF", {"b.Q8_0.gguf": b"GGUF", "b.Q4_0.gguf": b"GGUF"}),
        repo("models", "org/copies", MODEL | {"consolidated.safetensors": b"c" * 900, "original/a.safetensors": b"o"}),
        repo("datasets", "org/texts", {"a.parquet": b""}),
        repo("datasets", "org/own", {"a.parquet": b""}, private=True, tokens=(SECRET,)),
        repo("datasets", "org/asks", {"a.parquet": b""}, gated="auto", tokens=(SECRET,)),
    ]
    with hub_server(*repos) as running:
        yield running


def test_requests_and_their_errors_are_of_the_library_that_the_hub_s_client_uses():
    """httpx2 from huggingface_hub 2.0 on: errors of httpx would pass every `except`."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    from outliers.hub.http import httpx

    assert isinstance(get_session(), httpx.Client)
    assert issubclass(HfHubHTTPError, httpx.HTTPError)


def ask(endpoint, tmp_path, kind, name, revision=None, token=None, times=1, **environment):
    """What `resolve` says, in a process whose hub is `endpoint`: ([commit, public, bytes] or [error, message], stderr)."""
    script = (
        "import json, logging, sys\n"
        "from outliers.errors import OutliersError, UnknownModel\n"
        "from outliers.hub.client import resolve\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "kind, name, revision, times = json.loads(sys.argv[1])\n"
        "try:\n"
        "    for _ in range(times): found = resolve(kind, name, revision, UnknownModel)\n"
        "    print(json.dumps([found.commit, found.public, found.weight_bytes]))\n"
        "except OutliersError as error:\n"
        "    print(json.dumps([type(error).__name__, str(error)]))\n"
    )
    if token is not None:
        environment["HF_TOKEN"] = token
    known = client_environment(endpoint, tmp_path, **environment)
    done = run_program(script, json.dumps([kind, name, revision, times]), environment=known)
    # not even a log of everything shows it
    assert token is None or token not in done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    ("kind", "name", "revision", "token", "expected"),
    [
        ("model", "org/open", None, None, [COMMIT, True, 700]),
        ("model", "org/open", COMMIT, None, [COMMIT, True, 700]),
        # one copy of the weights is counted, as one is downloaded
        ("model", "org/copies", None, None, [COMMIT, True, 700]),
        ("model", "org/unlisted", None, None, [COMMIT, True, None]),
        ("model", "org/open", "v9", None, ["UnknownModel", "org/open has no revision 'v9'"]),
        ("model", "org/gated", None, None, ["UnknownModel", "gated: accept its terms on the hub and set HF_TOKEN"]),
        ("model", "org/gated", None, "hf_ofAnother", ["UnknownModel", "accept its terms on the hub and set HF_TOKEN"]),
        ("model", "org/gated", None, SECRET, [COMMIT, False, 700]),
        ("model", "org/own", None, SECRET, [COMMIT, False, 700]),
        ("model", "org/own", None, None, ["UnknownModel", "no model of the hub that this account may see"]),
        ("model", "org/missing", None, None, ["UnknownModel", "no model of the hub that this account may see"]),
        ("model", "org/open", None, "wrong", ["UnknownModel", "refuses the token it was given for org/open (401)"]),
        ("model", "org/open", None, "bad\x0bToken", ["UnknownModel", "characters that no token has"]),
        ("model", "org/open", None, "badTöken", ["UnknownModel", "characters that no token has"]),
        ("model", "an org/open", None, None, ["UnknownModel", "no name that the hub could have"]),
        ("model", "org/pickled", None, None, ["UnknownModel", "pickled weights (.bin, .pt) are never loaded"]),
        (
            *("model", "org/adapted", None, None),
            [
                "UnknownModel",
                "a LoRA adapter at 'main' (adapter_config.json, adapter_model.safetensors) next to a checkpoint",
            ],
        ),
        ("model", "org/lora", None, None, ["UnknownModel", "and no model: which of the two"]),
        ("model", "org/GGUF", None, None, ["UnknownModel", "such as b.Q4_0.gguf, and pass its path"]),
        ("dataset", "org/texts", None, None, [COMMIT, True, None]),
        # text that not everybody may read is not published unasked
        ("dataset", "org/own", None, SECRET, [COMMIT, False, None]),
        ("dataset", "org/asks", None, SECRET, [COMMIT, False, None]),
        ("dataset", "org/asks", None, None, ["UnknownModel", "gated: accept its terms on the hub and set HF_TOKEN"]),
        ("dataset", "org/none", None, None, ["UnknownModel", "no dataset of the hub that this account may see"]),
    ],
)
def test_what_a_name_is(hub, tmp_path, kind, name, revision, token, expected):
    found, _ = ask(hub.url, tmp_path, kind, name, revision, token)
    if len(expected) == 3:
        assert found == expected
    else:
        assert found[0] == expected[0]
        assert expected[1] in found[1]


def test_a_hub_that_is_not_there_is_transient(tmp_path):
    (kind, message), log = ask("http://127.0.0.1:9", tmp_path, "model", "org/open")
    assert kind == "HubUnavailable"
    assert "the hub did not answer in 3 tries" in message
    asked = "GET /api/models/org/open/revision/main"
    assert f"WARNING:outliers.hub.client:the hub did not answer (ConnectError) for {asked}: trying again in 1 s" in log


def test_a_hub_that_is_broken_is_transient(hub, tmp_path):
    hub.faults.append(Fault("GET /api/models/org/open", status=500, times=9))
    (kind, message), _ = ask(hub.url, tmp_path, "model", "org/open")
    hub.forget()
    assert kind == "HubUnavailable"
    assert "'org/open' is not a folder, a file or a built-in, and the hub did not answer" in message


def test_a_name_waits_as_it_is_told(hub, tmp_path):
    hub.faults.append(Fault("GET /api/models/org/open", status=429, headers={"RateLimit": '"api";r=0;t=2'}))
    hub.faults.append(Fault("GET /api/models/org/open", status=503, headers={"Retry-After": "1"}))
    began = time.monotonic()
    found, log = ask(hub.url, tmp_path, "model", "org/open")
    hub.forget()
    assert found == [COMMIT, True, 700]
    assert time.monotonic() - began > 3
    assert "the hub asks to wait 2 s (429)" in log
    assert "the hub asks to wait 1 s (503)" in log


def test_a_branch_is_asked_for_each_time_and_a_commit_once(hub, tmp_path):
    hub.forget()
    ask(hub.url, tmp_path, "dataset", "org/texts", "main", times=3)
    assert len(hub.requests("GET /api/datasets/org/texts")) == 3
    hub.forget()
    ask(hub.url, tmp_path, "dataset", "org/texts", COMMIT, times=3)
    assert len(hub.requests()) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "12"}, 12.0),
        # by the hub's own clock, whatever this machine's says
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:27:30 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 55.0),
        ({"retry-after": "soon", "ratelimit": '"resolvers"; r=0; t=7'}, 7.0),
        ({"retry-after": "3", "ratelimit": '"api";r=0;t=55'}, 3.0),
        ({}, None),
    ],
)
def test_how_long_an_answer_says_to_wait(headers, seconds):
    assert retry_after_seconds(headers) == seconds


def test_patience_ends_and_progress_renews_it(caplog):
    caplog.set_level(logging.WARNING)
    with tries_in_a_row(2):
        patience = Patience("a file")
    for _ in range(3):
        patience.wait("429", 0.01)
        patience.progress()
    patience.wait("429", 0.01)
    with pytest.raises(
        HubUnavailable, match="in 2 tries over 0 s, the last time with 429, for a file: try again later"
    ):
        patience.wait("429", 0.01)
    assert len(caplog.records) == 4


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model.safetensors", INDEX, "model-00001-of-00001.safetensors"], ["model.safetensors"]),
        ([INDEX, "model-1-of-2.safetensors", "model-2-of-2.safetensors", "consolidated-1.safetensors"], SHARDS),
        ([INDEX, "a.safetensors", "consolidated.safetensors"], ["a.safetensors"]),
        (["original/model.safetensors", "metal/model.safetensors"], []),
        # not what transformers looks for
        (["consolidated.safetensors"], []),
        (["model-1-of-2.safetensors"], []),
    ],
)
def test_one_copy_of_the_weights_is_needed(names, weights):
    small = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "qwen.tiktoken"]
    junk = ["README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "modeling.py", "onnx/config.json"]
    found = needed_files(tuple(HubFile(name, 1) for name in [*names, *junk, *small]))
    assert [file.name for file in found if file.name != INDEX] == [*small, *weights]
    assert (INDEX in names) == (INDEX in [file.name for file in found])
