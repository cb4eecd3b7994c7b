"""Data sets of the hub, streamed by the real clients from a server on loopback: the same documents whatever goes wrong."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outliers.corpus.documents import shuffled
from tests.support import tiny
from tests.support.cases import first_here
from tests.support.commands import run_program
from tests.support.hub_server import Fault, Repo, client_environment, commit_id, hub_server

pytestmark = pytest.mark.servers

OLD, NEW = commit_id("old"), commit_id("new")
SHARDS, ROWS = 4, 250


def parquet(rows, group=50):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


def rows(word, shard, count=ROWS, padding=0):
    # bytes that don't compress, where a shard must be large
    noise = [
        "".join(hashlib.sha256(f"{word}{shard}{i}{n}".encode()).hexdigest() for n in range(padding))
        for i in range(count)
    ]
    return [{"text": f"{word} {shard}.{i}: {noise[i]}", "id": i} for i in range(count)]


def texts_repo():
    def files(word):
        shards = {f"data/train-{n:05d}-of-{SHARDS:05d}.parquet": parquet(rows(word, n)) for n in range(SHARDS)}
        return shards | {"README.md": b"---\nlicense: mit\n---\n"}

    return Repo("datasets", "org/texts", {OLD: files("old"), NEW: files("new")}, {"main": OLD})


def lines_repo():
    """JSON lines, large enough to lie elsewhere behind a redirect, and read as one stream each."""
    files = {
        f"train-{n}.jsonl": "\n".join(map(json.dumps, rows("line", n, padding=90))).encode() + b"\n" for n in range(2)
    }
    assert min(map(len, files.values())) > 1_400_000
    return Repo("datasets", "org/lines", {OLD: files}, {"main": OLD})


CARD = b"""---
configs:
- config_name: first
  data_files: [{split: train, path: a.parquet}, {split: test, path: a.parquet}]
- config_name: second
  data_files: a.parquet
---
"""


@pytest.fixture(scope="module")
def hub():
    one = parquet([{"text": "a document"}])
    refused = [
        Repo("datasets", "org/subsets", {OLD: {"README.md": CARD, "a.parquet": one}}, {"main": OLD}),
        Repo("datasets", "org/body", {OLD: {"a.parquet": parquet([{"body": "x", "id": 1}])}}, {"main": OLD}),
        Repo("datasets", "org/numbers", {OLD: {"a.parquet": parquet([{"text": 1}])}}, {"main": OLD}),
        Repo("datasets", "org/scripted", {OLD: {"scripted.py": b"print('the script ran')"}}, {"main": OLD}),
        Repo("datasets", "org/nothing", {OLD: {"README.md": b"---\nlicense: mit\n---\n"}}, {"main": OLD}),
        Repo("datasets", "org/torn", {OLD: {"a.parquet": one[:-30]}}, {"main": OLD}),
    ]
    with hub_server(texts_repo(), lines_repo(), *refused) as running:
        yield running


@pytest.fixture(autouse=True)
def clean(hub):
    yield
    hub.forget()
    hub.find("datasets", "org/texts").branches["main"] = OLD


SCRIPT = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING)
from outliers.corpus.hub_data import find_documents
from outliers.errors import OutliersError
from outliers.hub.client import tries_in_a_row
from outliers.spec import CorpusSpec
tries, specs = json.loads(sys.argv[1])
for spec in (CorpusSpec(**given) for given in specs):
    try:
        with tries_in_a_row(tries):
            source = find_documents(spec)
            texts = list(source.texts(spec))
        print(json.dumps({"texts": texts, "identity": source.identity}))
    except OutliersError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def read(hub, home, *specs, tries=8, **environment):
    """What a process of its own reads: the documents or the error of each spec, and its log."""
    specs = [{"source": "org/texts", **spec} for spec in specs or ({},)]
    known = client_environment(hub.url, home, **environment)
    done = run_program(SCRIPT, json.dumps([tries, specs]), environment=known)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def undisturbed(hub, tmp_path_factory):
    """What is read of two sources when nothing goes wrong."""
    sources = ("org/texts", "org/lines")
    found, _ = read(hub, tmp_path_factory.mktemp("home"), *({"source": source} for source in sources))
    return dict(zip(sources, found, strict=True))


def test_every_row_comes_once_and_the_seed_alone_orders_them(hub, tmp_path, undisturbed):
    texts = undisturbed["org/texts"]["texts"]
    assert sorted(texts) == sorted(row["text"] for n in range(SHARDS) for row in rows("old", n))
    (again, other), _ = read(hub, tmp_path / "another machine", {}, {"seed": 1}, PYTHONHASHSEED="7")
    assert again["texts"] == texts
    assert sorted(other["texts"]) == sorted(texts)
    assert other["texts"] != texts
    # pinned: the same documents with any version of datasets, numpy or Python
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == "58aa175a100fb6e8"


def test_shuffling_by_hand():
    """Every draw checked against sha256sum's own numbers, which are written down here."""
    draws = [int(hashlib.sha256(f"5:{n}".encode()).hexdigest()[:16], 16) for n in range(6)]
    held, expected, source = ["a", "b", "c"], [], iter("defg")
    for draw, row in zip(draws, source, strict=False):
        expected.append(held[draw % 3])
        held[draw % 3] = row
    for draw in draws[4:]:
        place = draw % len(held)
        held[place], held[-1] = held[-1], held[place]
        expected.append(held.pop())
    assert list(shuffled("abcdefg", 5, 3)) == expected + held
    # an endless stream is fine, and no row comes more than a buffer too early
    early = list(itertools.islice(shuffled(map(str, itertools.count()), 0, 10), 100))
    assert all(int(text) <= place + 10 for place, text in enumerate(early))


TOLD, SOON = {"Retry-After": "1"}, {"RateLimit": '"api";r=0;t=1'}
FAULTS = {
    # name: (source, faults, what the log says)
    "refused and broken, at each kind of request": (
        "org/texts",
        [
            Fault("GET /api/datasets/org/texts/revision", status=429, headers=SOON),
            Fault("GET /api/datasets/org/texts/tree", status=429, headers=TOLD),
            Fault("GET /api/datasets/org/texts/tree", status=500),
            Fault("HEAD .*README", status=503),
            Fault("GET .*parquet", status=429, headers=TOLD, after=2),
            Fault("GET .*parquet", status=504, after=2),
        ],
        (r"the hub asks to wait 1 s \(429\)", r"the hub did not answer \(504\) for .*: trying again in 2 s"),
    ),
    "a table and a listing cut in the middle": (
        "org/texts",
        [Fault("GET .*parquet", cut_after=2000, after=2, times=2), Fault("/tree/", cut_after=50)],
        (r"the hub did not answer \(RemoteProtocolError\) for .*: trying again in 1 s",),
    ),
    "lines that lie elsewhere": (
        "org/lines",
        [Fault("GET /cdn/", cut_after=700_000, times=2), Fault("GET /cdn/", status=429, headers=TOLD)],
        (r"the hub asks to wait 1 s \(429\)",),
    ),
}


@pytest.mark.parametrize("name", first_here(FAULTS))
def test_the_documents_are_the_same_whatever_goes_wrong(hub, tmp_path, undisturbed, name):
    source, faults, says = FAULTS[name]
    hub.faults.extend(replace(fault) for fault in faults)
    (found,), log = read(hub, tmp_path, {"source": source})
    assert found == undisturbed[source], (found.get("message"), log)
    assert not any(fault.times for fault in hub.faults), "a fault was never met"
    assert all(re.search(words, log) for words in says), log


def test_a_shard_that_was_cut_for_good_is_opened_again_after_its_rows(tmp_path):
    """Not the hub's: a connection that no library mends. The rows that were taken are not taken twice."""
    from outliers.corpus.hub_data import _rows
    from outliers.spec import CorpusSpec

    class Torn:
        num_shards = 2
        broken = 2

        def shard(self, num_shards, index):
            for number in range(5):
                if number == 3 and self.broken:
                    self.broken -= 1
                    raise ConnectionError("Server Disconnected")
                yield {"text": f"{index}.{number}"}

    found = list(_rows(Torn(), CorpusSpec(source="org/torn"), "org/torn"))
    assert sorted(found) == [f"{index}.{number}" for index in range(2) for number in range(5)]


@pytest.mark.parametrize("match", first_here(["GET .*parquet", "GET /api/datasets/org/texts/tree", "HEAD .*texts.py"]))
def test_a_storm_ends_as_unavailable(hub, tmp_path, match):
    hub.faults.append(Fault(match, status=429, headers=TOLD, times=1000))
    (found,), log = read(hub, tmp_path, tries=3)
    assert found["error"] == "HubUnavailable"
    assert "the hub did not answer in 3 tries over 2 s, the last time with 429" in found["message"]
    assert log.count("the hub asks to wait 1 s (429)") == 2


def test_what_is_pinned_does_not_move(hub, tmp_path, undisturbed):
    hub.find("datasets", "org/texts").branches["main"] = NEW
    (pinned, moved), _ = read(hub, tmp_path, {"corpus_revision": OLD}, {})
    assert pinned == undisturbed["org/texts"]
    assert moved["identity"] != pinned["identity"]
    assert all(text.startswith("new") for text in moved["texts"])


REFUSED = [
    ({"source": "org/subsets"}, "['first', 'second']"),
    ({"source": "org/subsets", "subset": "third"}, "['first', 'second']"),
    ({"source": "org/subsets", "subset": "first", "split": "validation"}, "['train', 'test']"),
    ({"source": "org/texts", "split": "test"}, "['train']"),
    ({"source": "org/texts", "corpus_revision": "v9"}, "org/texts has no revision 'v9'"),
    ({"source": "org/body"}, "org/body has no column 'text'; its columns: body, id"),
    ({"source": "org/numbers"}, "the column 'text' of org/numbers holds int and no text"),
    ({"source": "org/scripted"}, "code of a data set is never run"),
    ({"source": "org/nothing"}, "the data set org/nothing can't be read"),
    ({"source": "org/torn"}, "the data set org/torn can't be read"),
]


def test_what_can_not_be_read_is_refused_at_once(hub, tmp_path):
    found, log = read(hub, tmp_path, *(spec for spec, _ in REFUSED))
    for answer, (spec, message) in zip(found, REFUSED, strict=True):
        assert answer.get("error") == "CorpusError", spec
        assert message in answer["message"]
    assert "the script ran" not in log
    assert "trying again" not in log


def test_a_gate_that_closes_while_reading_is_refused(hub, tmp_path):
    hub.faults.append(Fault("GET .*parquet", status=403, headers={"X-Error-Code": "GatedRepo"}, after=2, times=99))
    (found,), _ = read(hub, tmp_path)
    assert found == {
        "error": "CorpusError",
        "message": "org/texts is gated: accept its terms on the hub and set HF_TOKEN",
    }


PREPARE = """
import json, sys
from pathlib import Path
from outliers.corpus.tokens import load_corpus, prepare_corpus
from outliers.model.source import ModelSource
from outliers.spec import CorpusSpec
from outliers.workspace import open_workspace
folder, root, revision = sys.argv[1:]
workspace = open_workspace(Path(root))
spec = CorpusSpec(source="org/texts", num_sequences=8, sequence_length=64, corpus_revision=revision or None)
model = ModelSource(kind="folder", id="local:tiny", name="tiny", revision="1", path=folder)
info = prepare_corpus(spec, model, workspace)
corpus = load_corpus(info, workspace)
print(json.dumps({"info": info.model_dump(), "texts": list(corpus.sequence_texts)}))
"""


def prepare(hub, tmp_path, root, revision="", **environment):
    known = client_environment(hub.url, tmp_path / "home", **environment)
    done = run_program(PREPARE, tmp_path / "model", root, revision, environment=known)
    return json.loads(done.stdout)


def test_ids_are_saved_once_hashed_and_used_again(hub, tmp_path, undisturbed):
    tiny.save_tokenizer(tmp_path / "model")
    hub.faults.append(Fault("GET .*parquet", status=429, headers=TOLD, after=1))
    first = prepare(hub, tmp_path, tmp_path / "one", OLD)
    assert first["info"]["public"]
    assert first["info"]["source"] == "org/texts"
    taken = "".join(first["texts"])
    assert taken == "</s>".join(undisturbed["org/texts"]["texts"])[: len(taken)]
    hub.forget()
    # a branch is looked up, and nothing else is asked
    assert prepare(hub, tmp_path, tmp_path / "one") == first
    assert [asked.path for asked in hub.requests()] == ["/api/datasets/org/texts/revision/main"]
    hub.forget()
    # under its commit the corpus is found without the hub
    assert prepare(hub, tmp_path, tmp_path / "one", OLD, HF_HUB_OFFLINE="1") == first
    assert hub.requests() == []


def test_without_the_hub_and_without_ids_it_says_so(hub, tmp_path):
    (found,), _ = read(hub, tmp_path, {"corpus_revision": OLD}, HF_HUB_OFFLINE="1")
    assert found["error"] == "CorpusError"
    assert "the hub is switched off (HF_HUB_OFFLINE)" in found["message"]
    assert hub.requests() == []
