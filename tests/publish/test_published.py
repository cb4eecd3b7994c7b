"""Reading an artifact store: no more of it than needed, from a folder and from S3, and files there that are not a study."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest

from outliers.atlas.page import render
from outliers.atlas.table import read_atlas
from outliers.errors import BadInput, StoreUnavailable
from outliers.publish.shelf import read_store, read_study
from tests.support.atlas_store import (
    MODELS,
    CountingProxy,
    dozen,
    edited,
    objects,
    own,
    place_of,
    publish_all,
    quick_store,
    store,
    study,
)
from tests.support.commands import run_program
from tests.support.html_page import Page
from tests.support.s3 import BUCKET, environment, free_ports

__all__ = ["own", "store"]  # fixtures, found by name


@pytest.fixture(scope="module")
def bucket(s3_server, tmp_path_factory):
    """The same dozen in a bucket, of whose server this process is a reader; its URL, and who counts the requests."""
    s3_server.start()
    url, proxy = f"s3://{BUCKET}/{uuid4().hex}", CountingProxy(s3_server.ports["s3"])
    with environment(s3_server.environment()):
        publish_all(url, dozen())
    with environment(s3_server.environment(s3_server.reader) | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}):
        yield url, proxy
    proxy.close()


WATCHED = """
import os, sys
seen = []
watched = ("os.scandir", "os.listdir", "open")
def hear(event, found):
    # folders are opened on the way to a file, which is then opened by its name alone
    if event in watched and not (event == "open" and isinstance(found[2], int) and found[2] & os.O_DIRECTORY):
        seen.append((event, str(found[0])))
sys.addaudithook(hear)
from outliers.atlas.table import Filter, read_atlas
from outliers.publish.shelf import read_store, read_study
root = sys.argv[1]
del seen[:]
exec(sys.argv[2])
for event, path in list(seen):
    if path.startswith(root):
        print(event, path[len(root):].strip("/"))
    elif "/" not in path and event == "open":
        print(event, path)
"""


def touched(store, what):
    """What a process opens and lists of a folder: (event, path) pairs."""
    done = run_program(WATCHED, urlsplit(store).path, what, environment=os.environ)
    return [tuple(said.partition(" ")[::2]) for said in done.stdout.splitlines()]


def probes_of(store):
    """Where the probes of each study would be, below the store."""
    root = Path(urlsplit(store).path)
    return [f"{path.parent.relative_to(root)}/probes" for path in root.glob("*/*/manifest.json")]


def test_a_folder_is_listed_by_slug_and_study_alone(store):
    seen = touched(store, 'read_atlas("file://" + root)')
    listed = [path for event, path in seen if event != "open"]
    slugs = {path.name for path in Path(urlsplit(store).path).iterdir()}
    assert sorted(listed) == sorted(["", *slugs, *probes_of(store)])
    opened = Counter(path.rpartition("/")[2] for event, path in seen if event == "open")
    assert opened == {"manifest.json": 12, "summary.json": 12}


def test_a_list_and_a_filter_read_no_summary_in_vain(store):
    seen = touched(store, 'read_store("file://" + root, summaries=False)')
    assert not [path for event, path in seen if event == "open" and path.endswith("summary.json")]
    seen = touched(store, 'read_atlas("file://" + root, Filter(readings=("union",)))')
    assert len([path for event, path in seen if event == "open" and path.endswith("summary.json")]) == 1


@pytest.mark.servers
def test_a_bucket_is_listed_by_slug_and_study_alone(bucket, store):
    url, proxy = bucket
    proxy.requests.clear()
    atlas = read_atlas(url)
    here = [row.model_copy(update={"url": ""}) for row in read_atlas(store).rows]
    assert [row.model_copy(update={"url": ""}) for row in atlas.rows] == here
    slugs = {row.url.removeprefix(f"{url}/").partition("/")[0] for row in atlas.rows}
    assert {method for method, _ in proxy.requests} == {"GET"}
    queries = [parse_qs(urlsplit(path).query) for _, path in proxy.requests]
    lists = [query for query in queries if "list-type" in query]
    assert all(query["delimiter"] == ["/"] for query in lists)
    prefix = urlsplit(url).path.strip("/")
    below = [*(f"{slug}/" for slug in slugs), *(f"{place}/" for place in probes_of(store))]
    assert sorted(query["prefix"][0] for query in lists) == sorted(
        [f"{prefix}/", *(f"{prefix}/{part}" for part in below)]
    )
    read = Counter(urlsplit(path).path.rpartition("/")[2] for _, path in proxy.requests if "list-type" not in path)
    assert read == {"manifest.json": 12, "summary.json": 12}


@pytest.mark.servers
def test_a_list_of_a_bucket_reads_manifests_alone(bucket):
    url, proxy = bucket
    proxy.requests.clear()
    assert len(read_store(url, summaries=False).studies) == 12
    assert not [path for _, path in proxy.requests if "summary.json" in path]


@pytest.mark.servers
@pytest.mark.studies
def test_more_studies_than_one_page_of_a_listing(s3_server):
    """A listing has a thousand names a page; the rest must not be lost."""
    import s3fs

    s3_server.start()
    prefix, keys = uuid4().hex, s3_server.writer
    place, put = objects(study(1, MODELS[0]), {})
    slug = place.partition("/")[0]
    manifest = json.loads(put["manifest.json"])
    names = [f"{number:016x}" for number in range(1_005)]
    made = {
        f"{BUCKET}/{prefix}/{slug}/{name}/manifest.json": json.dumps(manifest | {"study_id": name}).encode()
        for name in names
    }
    writer = s3fs.S3FileSystem(
        key=keys.access_key,
        secret=keys.secret_key,
        endpoint_url=s3_server.endpoint,
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )
    writer.pipe(made)
    with environment(s3_server.environment(s3_server.reader)):
        found = read_store(f"s3://{BUCKET}/{prefix}", summaries=False)
    assert [item.manifest["study_id"] for item in found.studies] == names


def test_a_server_that_is_gone_is_an_error_that_may_pass(tmp_path):
    settings = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{free_ports(1)[0]}", "AWS_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_CONFIG_FILE": str(tmp_path / "none")}
    with environment(settings), pytest.raises(StoreUnavailable):
        read_atlas("s3://bucket/atlas")


def rewritten(root, number, change):
    """The study with another summary.json, which its manifest names."""
    folder = place_of(root, number)
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["folder"] / "summary.json"
    data = json.dumps(change(json.loads(path.read_text()))).encode()
    path.write_bytes(data)
    entry = next(file for file in manifest["files"] if file["path"] == "summary.json")
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def torn(root):
    path = place_of(root, 2) / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def folder_for_manifest(root):
    path = place_of(root, 2) / "manifest.json"
    path.unlink()
    path.mkdir()


DAMAGES = {
    "torn manifest": (torn, "is not JSON|malformed"),
    "not text": (
        lambda root: (place_of(root, 2) / "manifest.json").write_bytes(b"\xff\xfe\0"),
        "is not JSON|malformed",
    ),
    "a folder for a manifest": (folder_for_manifest, "could not read"),
    "newer manifest": (lambda root: edited(root, 2, schema_version=2), "schema_version 2, this program reads up to 1"),
    "foreign manifest": (lambda root: (place_of(root, 2) / "manifest.json").write_text("[1]"), "malformed"),
    "another study's manifest": (lambda root: edited(root, 2, study_id="f" * 16), "is of the study ffffffffffffffff"),
    "no manifest": (lambda root: (place_of(root, 2) / "manifest.json").unlink(), "has no manifest.json"),
    "no summary": (lambda root: next(place_of(root, 2).glob("*/summary.json")).unlink(), "is missing"),
    "torn summary": (lambda root: next(place_of(root, 2).glob("*/summary.json")).write_text("{"), "another sha256"),
    "newer summary": (
        lambda root: rewritten(root, 2, lambda s: s | {"schema_version": 3}),
        "schema_version 3, this program",
    ),
    "foreign summary": (lambda root: rewritten(root, 2, lambda s: {"schema_version": 1}), "malformed: study_id"),
    "a number as text": (
        lambda root: rewritten(root, 2, lambda s: s | {"criteria": s["criteria"] | {"magnitude": "six"}}),
        r"malformed: criteria\.magnitude",
    ),
    "another study's summary": (
        lambda root: rewritten(root, 2, lambda s: s | {"study_id": "e" * 16}),
        "is of the study eeeeeeeeeeeeeeee",
    ),
    "no summary named": (lambda root: edited(root, 2, files=[]), "names no summary.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_can_not_be_read_is_skipped_and_named(own, damage):
    act, why = DAMAGES[damage]
    act(own)
    atlas = read_atlas(f"file://{own}")
    assert [row.study_id for row in atlas.rows] == [f"{1:016x}"]
    (skipped,) = atlas.skipped
    assert re.search(why, skipped.why), skipped.why
    assert f"{2:016x}" in skipped.url
    assert f"{2:016x}" in skipped.why
    assert "1 thing in the store could not be read" in Page(render(atlas)).text


def test_foreign_things_are_skipped_and_named(own):
    (own / "README.txt").write_text("ours")
    (own / ".hidden").mkdir()
    (own / "Qwen--Qwen3-0.6B" / "notes.md").write_text("")
    (own / "Qwen--Qwen3-0.6B" / ".manifest.json.0123456789abcdef.part").write_text("of a publisher that was killed")
    (own / "pictures" / "holiday").mkdir(parents=True)
    atlas = read_atlas(f"file://{own}")
    assert len(atlas.rows) == 2
    names = sorted(item.url.removeprefix(f"file://{own}/") for item in atlas.skipped)
    assert names == [".hidden/", "Qwen--Qwen3-0.6B/notes.md", "README.txt", "pictures/holiday"]


def test_a_store_of_broken_things_says_what_is_wrong_and_one_remedy(own):
    """The refusal of a broken manifest keeps its own remedy; it does not ask to publish."""
    for number in (1, 2):
        (place_of(own, number) / "manifest.json").write_text("{")
    for read in (read_atlas, functools.partial(read_store, summaries=False)):
        with pytest.raises(BadInput) as refused:
            read(f"file://{own}")
        said = str(refused.value)
        assert said.startswith(
            f"file://{own} holds no study that can be read; of the 2 things there the first: the manifest"
        )
        assert said.endswith("remove it and run again")
    shutil.rmtree(place_of(own, 2))
    with pytest.raises(BadInput, match="that can be read; the one thing there: the manifest of"):
        read_atlas(f"file://{own}")
    shutil.rmtree(place_of(own, 1))
    with pytest.raises(
        BadInput, match=f"no published study yet; publish one: outliers study --publish-to file://{own}$"
    ):
        read_atlas(f"file://{own}")


def test_a_store_given_as_a_study_is_known_for_what_it_is(own):
    """The store to list is that itself; of a model's folder the one it is in."""
    model = place_of(own, 1).parent
    for place, kind in ((own, "an artifact store"), (model, "the folder of one model")):
        said = f"file://{place} is not a study, it is {kind}; `outliers runs list file://{own}` lists what is there"
        with pytest.raises(BadInput) as refused:
            read_study(f"file://{place}")
        assert str(refused.value) == said
    (place_of(own, 1) / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"has no manifest\.json: nothing is published there, or not yet"):
        read_study(f"file://{place_of(own, 1)}")


@pytest.mark.parametrize("made", ["nothing", "empty", "file", "foreign", "torn"])
def test_a_store_without_studies_is_an_error(tmp_path, made):
    root = tmp_path / "store"
    if made == "file":
        root.write_text("")
    elif made != "nothing":
        root.mkdir()
    if made == "foreign":
        (root / "a" / "b").mkdir(parents=True)
    if made == "torn":
        quick_store(root, [study(2, MODELS[0])])
        rewritten(root, 2, lambda summary: {})
    with pytest.raises(BadInput, match=r"store (is not there|holds no)"):
        read_atlas(f"file://{root}")
