"""Publishing, against a real S3 server and a real folder: whole or not at all, once, and never over another's numbers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from outliers.errors import (
    AccessDenied,
    BadInput,
    DigestConflict,
    ForbiddenFile,
    OutliersError,
    PublishRefused,
    StoreUnavailable,
    TargetError,
    TransientError,
)
from outliers.manifest import read_manifest, write_manifest
from outliers.publish import check_target, fetch, model_slug, publish, published_manifest
from outliers.targets import Stored, opened
from tests.results_folder import SLUG, STUDY_ID, finish, make_results, png
from tests.s3 import BUCKET, Keys, S3Server, environment, remove_sockets, s3_server

__all__ = ["s3_server"]  # the fixture, found by name
pytestmark = pytest.mark.servers

PUBLISHER = """
import sys
from pathlib import Path
from outliers.publish import publish
try:
    print(publish(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def start_publisher(results: Path, target: str) -> subprocess.Popen[str]:
    """A publisher as a process of its own, with this process's keys."""
    command = [sys.executable, "-c", PUBLISHER, str(results), target, SLUG]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@dataclass
class Objects:
    """All that lies at a target, with what would show a second writing."""

    target: str

    def seen(self) -> dict[str, Stored]:
        with opened(self.target) as store:
            return store.list("")

    def put(self, key: str, data: bytes) -> None:
        with opened(self.target) as store:
            store.put(key, data)

    def read(self, key: str) -> bytes | None:
        with opened(self.target) as store:
            return store.read(key)


@pytest.fixture
def s3(s3_server: S3Server) -> Iterator[str]:
    """A new prefix of the bucket, this process being the writer."""
    s3_server.start()
    with environment(s3_server.environment()):
        yield f"s3://{BUCKET}/{uuid4().hex}/atlas"


@pytest.fixture(params=["s3", "file"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return f"file://{tmp_path}/atlas"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same study from other hardware."""
    return make_results(tmp_path / "other", seed=1)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestOneStudy:
    def test_round_trip(self, target: str, results: Path, tmp_path: Path) -> None:
        check_target(target)
        assert published_manifest(target, SLUG, STUDY_ID) is None
        url = publish(results, target, SLUG)
        assert url == f"{target}/{SLUG}/{STUDY_ID}/manifest.json"
        manifest = read_manifest(results)
        assert published_manifest(target, SLUG, STUDY_ID) == manifest
        assert fetch(target, SLUG, STUDY_ID, tmp_path / "back") == manifest
        expected = files_of(results)
        del expected["run.log"]
        assert files_of(tmp_path / "back") == expected

    def test_layout(self, target: str, results: Path) -> None:
        publish(results, target, SLUG)
        manifest = read_manifest(results)
        assert manifest is not None
        inside = f"{SLUG}/{STUDY_ID}"
        named = {f"{inside}/{manifest['folder']}/{file['path']}" for file in manifest["files"]}
        assert set(Objects(target).seen()) == named | {f"{inside}/manifest.json"}

    def test_log_when_asked(self, target: str, results: Path) -> None:
        finish(results, log=True)
        publish(results, target, SLUG)
        assert sum(key.endswith("/run.log") for key in Objects(target).seen()) == 1

    def test_preflight_leaves_nothing(self, target: str) -> None:
        check_target(target)
        assert Objects(target).seen() == {}

    def test_second_time_changes_nothing(self, target: str, results: Path) -> None:
        url = publish(results, target, SLUG)
        before = Objects(target).seen()
        time.sleep(1.1)  # the server's clock has seconds
        assert publish(results, target, SLUG) == url
        assert Objects(target).seen() == before

    def test_same_numbers_in_other_bytes_change_nothing(self, target: str, results: Path, tmp_path: Path) -> None:
        publish(results, target, SLUG)
        before = Objects(target).seen()
        again = make_results(tmp_path / "again", plots=2)
        assert read_manifest(again) != read_manifest(results)
        time.sleep(1.1)
        publish(again, target, SLUG)
        assert Objects(target).seen() == before

    def test_other_numbers_are_refused(self, target: str, results: Path, other: Path) -> None:
        publish(results, target, SLUG)
        before = Objects(target).seen()
        with pytest.raises(DigestConflict) as caught:
            publish(other, target, SLUG)
        for folder in (results, other):
            manifest = read_manifest(folder)
            assert manifest is not None
            assert manifest["results_digest"] in str(caught.value)
        assert "--label NAME" in str(caught.value)
        assert Objects(target).seen() == before
        assert published_manifest(target, SLUG, STUDY_ID) == read_manifest(results)

    def test_two_studies_side_by_side(self, target: str, results: Path, tmp_path: Path) -> None:
        second = make_results(tmp_path / "second", seed=1, study_id="c" * 24)
        publish(results, target, SLUG)
        publish(second, target, SLUG)
        assert published_manifest(target, SLUG, STUDY_ID) == read_manifest(results)
        assert published_manifest(target, SLUG, "c" * 24) == read_manifest(second)


class TestRefusals:
    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
            lambda folder: (folder / "plots" / "late.png").write_bytes(png(9)),
            lambda folder: (folder / "plots" / "plot_000.png").write_bytes(b"\0" * 512),
            lambda folder: (folder / "report.html").unlink(),
            lambda folder: (folder / "summary.json").write_text((folder / "summary.json").read_text() + " "),
        ],
    )
    def test_folder_that_is_not_its_manifest(
        self, target: str, results: Path, change: Callable[[Path], object]
    ) -> None:
        change(results)
        with pytest.raises(ForbiddenFile):
            publish(results, target, SLUG)
        assert Objects(target).seen() == {}

    def test_manifest_of_other_numbers(self, target: str, results: Path) -> None:
        manifest = read_manifest(results)
        assert manifest is not None
        write_manifest(results, manifest | {"results_digest": "0" * 64})
        with pytest.raises(PublishRefused, match="does not belong"):
            publish(results, target, SLUG)
        assert Objects(target).seen() == {}

    def test_unfinished(self, target: str, results: Path) -> None:
        (results / "manifest.json").unlink()
        with pytest.raises(PublishRefused, match="not a finished study"):
            publish(results, target, SLUG)

    @pytest.mark.parametrize("data", [b"{", b"{}", b""])
    def test_malformed_publication(self, target: str, results: Path, data: bytes) -> None:
        Objects(target).put(f"{SLUG}/{STUDY_ID}/manifest.json", data)
        for act in (lambda: publish(results, target, SLUG), lambda: published_manifest(target, SLUG, STUDY_ID)):
            with pytest.raises(PublishRefused, match=r"manifest\.json"):
                act()
        assert Objects(target).read(f"{SLUG}/{STUDY_ID}/manifest.json") == data

    @pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
    def test_names_that_lead_elsewhere(self, target: str, name: str) -> None:
        with pytest.raises(BadInput):
            published_manifest(target, name, STUDY_ID)
        with pytest.raises(BadInput):
            published_manifest(target, SLUG, name)

    @pytest.mark.parametrize(
        "url",
        ["", "atlas", "http://x/y", "s3:///x", "file:///", "file://host/x", "s3://key:secret@bucket/x", "s3://b/x?y=1"],
    )
    def test_urls_that_are_no_target(self, url: str) -> None:
        with pytest.raises(TargetError) as caught:
            check_target(url)
        assert "secret" not in str(caught.value)


class TestFetch:
    def damage(self, target: str, results: Path, data: bytes | None) -> str:
        manifest = read_manifest(results)
        assert manifest is not None
        key = f"{SLUG}/{STUDY_ID}/{manifest['folder']}/summary.json"
        with opened(target) as store:
            store.delete(key)
            if data is not None:
                store.put(key, data)
        return key

    @pytest.mark.parametrize("data", [None, b"{}"])
    def test_damaged(self, target: str, results: Path, tmp_path: Path, data: bytes | None) -> None:
        publish(results, target, SLUG)
        back = tmp_path / "back"
        fetch(target, SLUG, STUDY_ID, back)
        key = self.damage(target, results, data)
        with pytest.raises(PublishRefused, match=key):
            fetch(target, SLUG, STUDY_ID, back)
        assert read_manifest(back) is None

    def test_not_published(self, target: str, tmp_path: Path) -> None:
        with pytest.raises(PublishRefused, match="not published"):
            fetch(target, SLUG, STUDY_ID, tmp_path / "back")

    @pytest.mark.parametrize("path", ["../../escaped", "/tmp/escaped", "plots/../../escaped.png", "manifest.json"])
    def test_manifest_that_leads_elsewhere(self, target: str, results: Path, tmp_path: Path, path: str) -> None:
        manifest = read_manifest(results)
        assert manifest is not None
        manifest["files"][0]["path"] = path
        Objects(target).put(f"{SLUG}/{STUDY_ID}/manifest.json", json.dumps(manifest).encode())
        with pytest.raises(PublishRefused, match="no place there"):
            fetch(target, SLUG, STUDY_ID, tmp_path / "a" / "b")


class TestOrphans:
    OLD, FRESH = "0123456789ab", "ba9876543210"

    def test_old_ones_go_and_young_ones_stay(self, results: Path, tmp_path: Path) -> None:
        target, study = f"file://{tmp_path}/atlas", tmp_path / "atlas" / SLUG / STUDY_ID
        for folder in (self.OLD, self.FRESH, "notes"):
            Objects(target).put(f"{SLUG}/{STUDY_ID}/{folder}/plots/a.png", b"x")
        hours_ago = time.time() - 4_000
        for folder in (self.OLD, "notes"):
            os.utime(study / folder / "plots" / "a.png", (hours_ago, hours_ago))
        publish(results, target, SLUG)
        own = (read_manifest(results) or {})["folder"]
        assert {path.name for path in study.iterdir()} == {own, self.FRESH, "notes", "manifest.json"}

    def test_the_published_folder_stays_however_old(self, results: Path, tmp_path: Path) -> None:
        target = f"file://{tmp_path}/atlas"
        publish(results, target, SLUG)
        for path in (tmp_path / "atlas").rglob("*"):
            os.utime(path, (0, 0))
        publish(results, target, SLUG)
        fetch(target, SLUG, STUDY_ID, tmp_path / "back")

    def test_young_ones_stay_in_a_bucket(self, s3: str, results: Path) -> None:
        Objects(s3).put(f"{SLUG}/{STUDY_ID}/{self.FRESH}/a", b"x")
        publish(results, s3, SLUG)
        assert f"{SLUG}/{STUDY_ID}/{self.FRESH}/a" in Objects(s3).seen()


class TestTwoAtOnce:
    def test_same_results(self, target: str, results: Path, tmp_path: Path) -> None:
        publishers = [start_publisher(results, target) for _ in range(3)]
        outputs = [publisher.communicate(timeout=120)[0] for publisher in publishers]
        assert [publisher.returncode for publisher in publishers] == [0, 0, 0], outputs
        assert len(set(outputs)) == 1
        fetch(target, SLUG, STUDY_ID, tmp_path / "back")

    def test_different_results(self, target: str, results: Path, other: Path, tmp_path: Path) -> None:
        publishers = [start_publisher(folder, target) for folder in (results, other)]
        outputs = [publisher.communicate(timeout=120)[0] for publisher in publishers]
        codes = [publisher.returncode for publisher in publishers]
        assert sorted(codes) == [0, 3], outputs
        assert outputs[codes.index(3)].startswith("DigestConflict")
        winner = (results, other)[codes.index(0)]
        assert fetch(target, SLUG, STUDY_ID, tmp_path / "back") == read_manifest(winner)

    def test_one_winner_of_the_manifest(self, target: str) -> None:
        # the step that all rests on, without anything around it that could hide a second winner
        won: list[bool] = []
        ready = threading.Barrier(8)

        def race(n: int) -> None:
            with opened(target) as store:
                store.read("warm")
                ready.wait(60)
                won.append(store.create("a/manifest.json", b"%d" % n))

        racers = [threading.Thread(target=race, args=(n,)) for n in range(8)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sorted(won) == [False] * 7 + [True]


def first_request(listener: socket.socket) -> str:
    """The first request that arrives, answered with 403."""
    connection, _ = listener.accept()
    with connection:
        request = connection.recv(65_536).decode()
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    return request


class TestRights:
    def refusal(self, results: Path, target: str, settings: dict[str, str], *, reads: bool = False) -> list[str]:
        """What each step says to these keys; `reads` where they may look."""
        secrets = [settings[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN") if name in settings]
        steps: list[Callable[[], object]] = [lambda: check_target(target), lambda: publish(results, target, SLUG)]
        steps += [] if reads else [lambda: published_manifest(target, SLUG, STUDY_ID)]
        said = []
        with environment(settings):
            for step in steps:
                with pytest.raises(AccessDenied) as caught:
                    step()
                whole = "".join(traceback.format_exception(caught.value))
                assert not any(secret in whole for secret in secrets)
                said.append(str(caught.value))
        return said

    def test_wrong_secret(self, s3_server: S3Server, s3: str, results: Path) -> None:
        settings = s3_server.environment(Keys("writer", "wrong-" * 6))
        for said in self.refusal(results, s3, settings):
            assert "SignatureDoesNotMatch" in said
        assert Objects(s3).seen() == {}

    def test_unknown_key(self, s3_server: S3Server, s3: str, results: Path) -> None:
        for said in self.refusal(results, s3, s3_server.environment(Keys("stranger", "s" * 40))):
            assert "InvalidAccessKeyId" in said

    def test_no_keys(self, s3_server: S3Server, s3: str, results: Path) -> None:
        settings = {name: value for name, value in s3_server.environment().items() if "ACCESS_KEY" not in name}
        for said in self.refusal(results, s3, settings):
            assert "AWS_ACCESS_KEY_ID" in said

    def test_unknown_profile(self, s3_server: S3Server, s3: str, results: Path) -> None:
        for said in self.refusal(results, s3, s3_server.environment() | {"AWS_PROFILE": "nobody"}):
            assert "AWS_PROFILE" in said

    def test_missing_bucket(self, s3_server: S3Server, results: Path) -> None:
        for said in self.refusal(results, "s3://no-such-bucket/a", s3_server.environment(s3_server.admin)):
            assert "there is no bucket 'no-such-bucket'" in said
        for said in self.refusal(results, "s3://no-such-bucket/a", s3_server.environment()):
            assert "no-such-bucket" in said

    def test_reader_may_not_write(self, s3_server: S3Server, s3: str, results: Path) -> None:
        for said in self.refusal(results, s3, s3_server.environment(s3_server.reader), reads=True):
            assert "could not write" in said
        assert Objects(s3).seen() == {}

    def test_reader_may_read(self, s3_server: S3Server, s3: str, results: Path, tmp_path: Path) -> None:
        publish(results, s3, SLUG)
        with environment(s3_server.environment(s3_server.reader)):
            assert fetch(s3, SLUG, STUDY_ID, tmp_path / "back") == read_manifest(results)
            publish(results, s3, SLUG)  # nothing to do, and no right to do it

    def test_keys_from_a_profile_and_the_general_endpoint(self, s3_server: S3Server, s3: str, tmp_path: Path) -> None:
        keys = s3_server.writer
        settings = s3_server.environment()
        settings["AWS_ENDPOINT_URL"] = settings.pop("AWS_ENDPOINT_URL_S3")
        settings["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "credentials")
        settings["AWS_PROFILE"] = "atlas"
        del settings["AWS_ACCESS_KEY_ID"], settings["AWS_SECRET_ACCESS_KEY"]
        (tmp_path / "credentials").write_text(
            f"[atlas]\naws_access_key_id={keys.access_key}\naws_secret_access_key={keys.secret_key}\n"
        )
        with environment(settings):
            check_target(s3)

    def test_region(self, s3_server: S3Server) -> None:
        """AWS_REGION is what requests are signed for; our server takes any region, so a listener looks at the request."""
        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
            endpoint = {
                "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{listener.getsockname()[1]}",
                "AWS_REGION": "eu-west-3",
            }
            heard = pool.submit(first_request, listener)
            with environment(s3_server.environment() | endpoint), pytest.raises(AccessDenied):
                published_manifest("s3://bucket/atlas", SLUG, STUDY_ID)
            assert "/eu-west-3/s3/aws4_request" in heard.result(60)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("AWS_ENDPOINT_URL_S3", "127.0.0.1:1"),
            ("AWS_ENDPOINT_URL_S3", "http://someone:hidden-word@127.0.0.1:1"),
            ("AWS_SESSION_TOKEN", "hidden-word\nx"),
        ],
    )
    def test_settings_that_can_not_work(self, s3_server: S3Server, s3: str, name: str, value: str) -> None:
        with environment(s3_server.environment() | {name: value}), pytest.raises(OutliersError) as caught:
            check_target(s3)
        assert isinstance(caught.value, TargetError)
        assert "hidden-word" not in str(caught.value)


class TestFolder:
    def test_makes_it(self, tmp_path: Path) -> None:
        check_target(f"file://{tmp_path}/a/b")
        assert list((tmp_path / "a" / "b").iterdir()) == []

    @pytest.mark.parametrize("below", ["", "/b"])
    def test_a_file_is_in_the_way(self, tmp_path: Path, results: Path, below: str) -> None:
        (tmp_path / "a").write_text("")
        with pytest.raises(TargetError):
            check_target(f"file://{tmp_path}/a{below}")
        with pytest.raises((TargetError, PublishRefused)):
            publish(results, f"file://{tmp_path}/a{below}", SLUG)

    def test_may_not_write(self) -> None:
        # not even root may make a folder there
        with pytest.raises(TargetError, match="can't be written"):
            check_target("file:///proc/atlas")


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[S3Server]:
    """A server that a test may kill, this process being its writer."""
    with S3Server(tmp_path / "server") as server, environment(server.environment()):
        yield server


class TestServerGone:
    TARGET = f"s3://{BUCKET}/atlas"

    def test_down_and_back(self, own_server: S3Server, results: Path, tmp_path: Path) -> None:
        publish(results, self.TARGET, SLUG)
        own_server.kill()
        second = make_results(tmp_path / "second", study_id="c" * 24)
        steps: list[Callable[[], object]] = [
            lambda: check_target(self.TARGET),
            lambda: published_manifest(self.TARGET, SLUG, STUDY_ID),
            lambda: publish(second, self.TARGET, SLUG),
            lambda: fetch(self.TARGET, SLUG, STUDY_ID, tmp_path / "back"),
        ]
        for step in steps:
            with pytest.raises(StoreUnavailable) as caught:
                step()
            assert isinstance(caught.value, TransientError)
            assert own_server.endpoint.removeprefix("http://") in str(caught.value)
        own_server.start()
        # a server that listens again may still answer 500 for a moment, on a busy machine: that error is a transient one
        deadline = time.monotonic() + 60
        for step in steps:
            while True:
                try:
                    step()
                    break
                except TransientError:
                    assert time.monotonic() < deadline, "the server is back and does not answer"
                    time.sleep(0.5)
        assert published_manifest(self.TARGET, SLUG, "c" * 24) == read_manifest(second)

    def test_silent(self, own_server: S3Server, results: Path) -> None:
        """A server that accepts and never answers ends in an error too, also under data that fill every buffer."""
        own_server.freeze()
        steps = (lambda: check_target(self.TARGET), lambda: Objects(self.TARGET).put("a", bytes(1_000_000)))
        with ThreadPoolExecutor() as pool:
            errors = [asked.exception() for asked in [pool.submit(step) for step in steps]]
        own_server.thaw()
        assert [type(error) for error in errors] == [StoreUnavailable] * 2
        publish(results, self.TARGET, SLUG)

    def test_killed_between_two_objects(self, own_server: S3Server, tmp_path: Path) -> None:
        results = make_results(tmp_path / "many", plots=200)
        publisher = start_publisher(results, self.TARGET)
        deadline = time.monotonic() + 120
        with opened(self.TARGET) as store:
            while len(store.list("")) < 10:
                assert time.monotonic() < deadline, "nothing arrives"
                assert publisher.poll() is None, publisher.communicate()[0]
        own_server.kill()
        output = publisher.communicate(timeout=120)[0]
        assert output.startswith("StoreUnavailable"), output
        own_server.start()
        half = Objects(self.TARGET).seen()
        assert 10 <= len(half) < 200
        assert published_manifest(self.TARGET, SLUG, STUDY_ID) is None
        publish(results, self.TARGET, SLUG)
        assert fetch(self.TARGET, SLUG, STUDY_ID, tmp_path / "back") == read_manifest(results)

    def test_readers_see_all_or_nothing(self, own_server: S3Server, tmp_path: Path) -> None:
        results = make_results(tmp_path / "many", plots=60)
        publisher = start_publisher(results, self.TARGET)
        early = 0
        while published_manifest(self.TARGET, SLUG, STUDY_ID) is None:
            early += 1
            assert publisher.poll() in (None, 0), publisher.communicate()[0]
        fetch(self.TARGET, SLUG, STUDY_ID, tmp_path / "back")
        assert publisher.communicate(timeout=60)[0].startswith(self.TARGET)
        assert early > 0

    def test_server_dies_with_who_started_it(self, tmp_path: Path) -> None:
        """What the other tests rely on, so that a killed test run leaves no server."""
        program = (
            "import sys, time; from pathlib import Path; from tests.s3 import S3Server\n"
            "server = S3Server(Path(sys.argv[1])); server.start(); "
            "print(server.pid, *server.ports.values(), flush=True); time.sleep(600)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert parent.stdout is not None
        server, *ports = map(int, parent.stdout.readline().split())
        parent.kill()
        parent.communicate()
        deadline = time.monotonic() + 30
        while Path(f"/proc/{server}/cmdline").exists() and Path(f"/proc/{server}/cmdline").read_bytes():
            assert time.monotonic() < deadline, f"server {server} lives on"
            time.sleep(0.05)
        remove_sockets(ports)


@pytest.mark.parametrize(
    ("model_id", "slug"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen--Qwen3-30B-A3B"),
        ("builtin:smollm2", "builtin-smollm2"),
        ("local:abc", "local-abc"),
        ("gpt2", "gpt2"),
        ("../../etc", "etc"),
        ("a b/c?d#e", "a-b--c-d-e"),
    ],
)
def test_slugs(model_id: str, slug: str) -> None:
    assert model_slug(model_id) == slug


def test_long_slugs_differ() -> None:
    slugs = {model_slug("x" * 200 + end) for end in ("", "a", "b")}
    assert len(slugs) == 3
    assert max(map(len, slugs)) <= 100


@pytest.mark.parametrize("model_id", ["", "..", "/", "模型"])
def test_no_slug(model_id: str) -> None:
    with pytest.raises(BadInput):
        model_slug(model_id)
