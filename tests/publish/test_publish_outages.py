"""Publishing to a server that is down, silent or killed between two objects: an error that may pass, and nothing half."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outliers.errors import StoreUnavailable, TransientError
from outliers.publish.manifest import read_manifest
from outliers.publish.publish import check_target, fetch, publish, published_manifest
from outliers.publish.stores.bucket import BucketStore
from outliers.publish.stores.open import opened
from tests.support.publishing import Objects, results, start_publisher
from tests.support.results_folder import SLUG, STUDY_ID, make_results
from tests.support.s3 import BUCKET, S3Server, environment, remove_sockets

__all__ = ["results"]  # a fixture, found by name
pytestmark = pytest.mark.servers


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[S3Server]:
    """A server that a test may kill, this process being its writer."""
    with S3Server(tmp_path / "server") as server, environment(server.environment()):
        yield server


def answered(step: Callable[[], Any]) -> Any:
    """What a step gives once the server, which listens again after a kill, answers: on a busy machine that takes a moment.

    It is done as a user does it: an error that may pass is tried again, any other is raised.
    """
    deadline = time.monotonic() + 60
    while True:
        try:
            return step()
        except TransientError:
            assert time.monotonic() < deadline, "the server is back and does not answer"
            time.sleep(0.5)


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
        for step in steps:
            answered(step)
        assert published_manifest(self.TARGET, SLUG, "c" * 24) == read_manifest(second)

    @pytest.mark.studies
    def test_silent(self, own_server: S3Server, results: Path) -> None:
        """A server that accepts and never answers ends in an error too, also under data that fill every buffer."""
        own_server.freeze()
        steps = (lambda: check_target(self.TARGET), lambda: Objects(self.TARGET).put("a", bytes(1_000_000)))
        with ThreadPoolExecutor() as pool:
            errors = [asked.exception() for asked in [pool.submit(step) for step in steps]]
        own_server.thaw()
        assert [type(error) for error in errors] == [StoreUnavailable] * 2
        publish(results, self.TARGET, SLUG)

    @pytest.mark.studies
    def test_killed_between_two_objects(self, own_server: S3Server, tmp_path: Path) -> None:
        results = make_results(tmp_path / "many")
        publisher = start_publisher(results, self.TARGET, more=80)
        deadline = time.monotonic() + 120
        with opened(self.TARGET) as store:
            while len(store.list("")) < 10:
                assert time.monotonic() < deadline, "nothing arrives"
                assert publisher.poll() is None, publisher.communicate()[0]
        own_server.kill()
        output = publisher.communicate(timeout=120)[0]
        assert output.startswith("StoreUnavailable"), output
        own_server.start()
        half = answered(Objects(self.TARGET).seen)
        assert 10 <= len(half) < 80
        assert answered(lambda: published_manifest(self.TARGET, SLUG, STUDY_ID)) is None
        answered(lambda: publish(results, self.TARGET, SLUG))
        assert fetch(self.TARGET, SLUG, STUDY_ID, tmp_path / "back") == read_manifest(results)

    def test_readers_see_all_or_nothing(self, own_server: S3Server, tmp_path: Path) -> None:
        results = make_results(tmp_path / "many")
        publisher = start_publisher(results, self.TARGET, more=40)
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
            "import sys, time; from pathlib import Path; from tests.support.s3 import S3Server\n"
            "server = S3Server(Path(sys.argv[1])); server.start(); "
            "print(server.pid, *server.ports.values(), flush=True); time.sleep(600)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
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


def trickle(listener: socket.socket, over: threading.Event) -> None:
    """Answers one request with an answer that goes on arriving, a byte at a time, until the test is over. TimeoutError where
    nobody asks: a test that fails before must not wait for ever."""
    listener.settimeout(60)
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not over.wait(0.2):
            connection.sendall(b"x")


def test_an_answer_that_never_ends_is_given_up(tmp_path: Path) -> None:
    """Each byte comes in time, so that no timeout of a read ends it: the call as a whole has a limit."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        server = pool.submit(trickle, listener, over)
        settings = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "writer",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(tmp_path / "none"),
        }
        try:
            with environment(settings):
                # a busy machine takes seconds for the client alone, before it asks
                store = BucketStore("s3://bucket/atlas", "bucket", "atlas", call_seconds=8)
                began = time.monotonic()
                with contextlib.closing(store), pytest.raises(StoreUnavailable, match="no answer"):
                    store.read("a")
            assert 7 < time.monotonic() - began < 60
        finally:
            over.set()
        server.result(10)


LEFT_ALONE = """
import asyncio, gc, sys, time
import aiohttp
from fsspec.asyn import get_loop
from outliers.publish.stores.open import opened

async def fails(error):
    raise error

async def begin(error):
    asyncio.ensure_future(fails(error))
    await asyncio.sleep(0.05)
    gc.collect()

with opened("s3://atlas/atlas"):
    for error in (aiohttp.ClientConnectionResetError("of the half that sends"), KeyError("of somebody else")):
        asyncio.run_coroutine_threadsafe(begin(error), get_loop()).result(10)
"""


def test_what_breaks_unasked_is_told_unless_a_request_tells_it(s3_server: S3Server) -> None:
    """The half of a request that was sending when its server died: asyncio would print its traceback next to the error."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_ALONE],
        env=os.environ | s3_server.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "of somebody else" in done.stderr
    assert "of the half that sends" not in done.stderr
    assert done.stderr.count("never retrieved") == 1
