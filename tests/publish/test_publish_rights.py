"""Publishing without the right to: keys, buckets, settings and folders that can't work are refused, and no secret is said."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outliers.errors import AccessDenied, OutliersError, PublishRefused, TargetError
from outliers.publish.manifest import read_manifest
from outliers.publish.publish import check_target, fetch, publish, published_manifest
from tests.support.publishing import Objects, results, s3
from tests.support.results_folder import SLUG, STUDY_ID
from tests.support.s3 import Keys, S3Server, environment

__all__ = ["results", "s3"]  # fixtures, found by name
pytestmark = pytest.mark.servers


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
