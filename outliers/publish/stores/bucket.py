"""A bucket (s3://) as an artifact store, through s3fs.

Keys, region and endpoint come from the environment as AWS's own tools read them. A server that is down is noticed
within CALL_SECONDS, whichever way it is down, and nothing is remembered between two uses: a retry sees the world as it
then is. It knows nothing of studies. It is imported only where a target is s3://, for s3fs is of the extra `flows`.
Before it: `targets`. After it: `publish`.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import functools
import http.client
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import s3fs
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

from outliers.errors import AccessDenied, OutliersError, PublishRefused, StoreUnavailable, TargetError
from outliers.files.beneath import LISTED
from outliers.publish.stores.base import LISTED_BELOW, MAX_OBJECT_BYTES, Children, Stored, too_many

CONNECT_SECONDS = 4
READ_SECONDS = 5
ATTEMPTS = 2
"""Silence is waited out twice, 5 s each; further tries are the flow's, which shows them."""
CALL_SECONDS = 14.0
SLOWEST_BYTES_PER_SECOND = 200_000
"""A put may take CALL_SECONDS and its bytes at this rate. Without an end of its own it hangs for ever on a server that
accepts and reads nothing: measured with 1 MB and a stopped weed 4.48, neither botocore nor aiohttp bounds sending."""

_KEYS_REFUSED = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is not valid",
    "TokenRefreshRequired": "the session token has expired",
    "InvalidSecurity": "the keys are not valid",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the server's",
}
_BUSY_CODES = {"SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "TooManyRequests"}
_NO_KEYS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.CredentialRetrievalError,
    boto.SSOError,
)
_NO_ANSWER = (
    boto.HTTPClientError,
    boto.ConnectionError,
    ResponseParserError,
    aiohttp.ClientError,
    http.client.IncompleteRead,
    FSTimeoutError,
    TimeoutError,
    ConnectionError,
)


def tell_of_what_nobody_awaits(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A handler of a loop's errors: a connection that broke while its request was being sent is told by that request.

    aiohttp leaves the half that was sending unasked, and asyncio would print its traceback beside the error itself.
    """
    if not isinstance(context.get("exception"), (aiohttp.ClientError, ConnectionError)):
        loop.default_exception_handler(context)


class BucketStore:
    """Objects of `bucket` below `prefix`; `targets.opened` makes it for one use and closes it.

    After a first call, which settles the connection, threads may read at once.
    """

    def __init__(self, url: str, bucket: str, prefix: str) -> None:
        self.url = url
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        # botocore itself reads AWS_DEFAULT_REGION only, AWS's other tools AWS_REGION first.
        region = os.environ.get("AWS_REGION")
        self._s3 = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            client_kwargs={"region_name": region} if region else {},
            config_kwargs={
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
            },
        )
        self._s3.loop.call_soon_threadsafe(self._s3.loop.set_exception_handler, tell_of_what_nobody_awaits)
        # s3fs tries 5 times around botocore's tries, and twice over when it reads a body: 25 times in all.
        self._s3.retries = 1

    def close(self) -> None:
        creator = getattr(self._s3, "_s3creator", None)
        if creator is not None:
            with contextlib.suppress(FSTimeoutError):
                sync(self._s3.loop, creator.__aexit__, None, None, None, timeout=1)

    def check(self) -> None:
        call, where = self._s3._call_s3, {"Bucket": self._bucket}
        self._call("list", "", lambda: call("list_objects_v2", **where, Prefix=self._prefix, MaxKeys=1))
        # The right to write, asked without writing: an upload that is begun and given up leaves no object.
        where["Key"] = f"{self._prefix}.probe-{secrets.token_hex(8)}"
        begun = self._call("write", "", lambda: call("create_multipart_upload", **where))
        with contextlib.suppress(AccessDenied, PublishRefused):
            upload = begun["UploadId"]
            self._call("write", "", lambda: call("abort_multipart_upload", **where, UploadId=upload))

    def read(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        where = {"Bucket": self._bucket, "Key": self._prefix + key}

        async def read_some() -> tuple[bytearray, int]:
            """At most one byte more than the limit, and the size that the server says."""
            answer = await self._s3._call_s3("get_object", **where)
            body, data = answer["Body"], bytearray()
            try:
                # what is not read is not sent: closing ends the connection
                while len(data) <= max_bytes and (piece := await body.read(max_bytes + 1 - len(data))):
                    data += piece
            finally:
                body.close()
            return data, int(answer.get("ContentLength") or 0)

        try:
            data, size = self._call("read", key, read_some)
        except _NoSuchKeyError:
            return None
        if len(data) > max_bytes:
            raise PublishRefused(
                f"could not read {self.url}/{key}: it has {max(size, len(data)):,} bytes, at most {max_bytes:,} are read; "
                "remove it there, or give another target"
            )
        return bytes(data)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, mode="overwrite")

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, data, mode="create")  # sends If-None-Match: *
        except _ExistsError:
            return False
        return True

    def list(self, prefix: str) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        page: dict[str, str] = {}
        while True:
            asked = {"Bucket": self._bucket, "Prefix": self._prefix + prefix, **page}
            answer = self._call("list", prefix, functools.partial(self._s3._call_s3, "list_objects_v2", **asked))
            for row in answer.get("Contents", ()):
                key = row["Key"].removeprefix(self._prefix)
                found[key] = Stored(row["Size"], row["LastModified"].timestamp())
            if len(found) > LISTED_BELOW:
                raise PublishRefused(too_many(f"{self.url}/{prefix}"))
            if not answer.get("IsTruncated"):
                return found
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    def children(self, prefix: str) -> Children:
        folders, files = builtins.list[str](), builtins.list[str]()
        page: dict[str, str] = {}
        below = self._prefix + prefix
        while True:
            asked = {"Bucket": self._bucket, "Prefix": below, "Delimiter": "/", **page}
            answer = self._call("list", prefix, functools.partial(self._s3._call_s3, "list_objects_v2", **asked))
            folders += [row["Prefix"].removeprefix(below).rstrip("/") for row in answer.get("CommonPrefixes", ())]
            files += [name for row in answer.get("Contents", ()) if (name := row["Key"].removeprefix(below))]
            if not answer.get("IsTruncated") or len(folders) + len(files) > LISTED:
                return Children(folders, files, [], whole=len(folders) + len(files) <= LISTED)
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        where = {"Bucket": self._bucket, "Key": self._prefix + key}
        self._call("remove", key, lambda: self._s3._call_s3("delete_object", **where))

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{self._prefix}{key}"

    def _write(self, key: str, data: bytes, mode: str) -> None:
        seconds = CALL_SECONDS + len(data) / SLOWEST_BYTES_PER_SECOND
        self._call("write", key, lambda: self._s3._pipe_file(self._path(key), data, mode=mode), seconds)

    def _call(self, doing: str, key: str, ask: Callable[[], Awaitable[Any]], seconds: float = CALL_SECONDS) -> Any:
        """What `ask` gives within `seconds`; what it raises, as an error of the tree."""

        async def limited() -> Any:
            # Cancelled when its time is over; a timeout of `sync` alone would leave it running.
            return await asyncio.wait_for(ask(), seconds)

        try:
            return sync(self._s3.loop, limited)
        except (OSError, ValueError, boto.BotoCoreError, boto.ClientError, *_NO_ANSWER) as error:
            url = f"{self.url}/{key}" if key else self.url
            raise _translated(error, doing, url, self._bucket) from error


class _NoSuchKeyError(PublishRefused):
    """The object is not there."""


class _ExistsError(PublishRefused):
    """The object is there, and was to be created."""


def _server() -> str:
    """Host and port of the endpoint, without anything else that its URL may hold."""
    parts = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    return parts.netloc.rpartition("@")[2] or "AWS S3"


def _translated(error: Exception, doing: str, url: str, bucket: str) -> OutliersError:
    answer = next((e for e in (error, error.__cause__) if isinstance(e, boto.ClientError)), None)
    why = f"could not {doing} {url} at {_server()}"
    kind = type(error).__name__
    if answer is not None:
        code = str(answer.response.get("Error", {}).get("Code", ""))
        status = int(answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _refusal(code, status, why, bucket)
    if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.EINVAL:
        return _ExistsError(f"{why}: it is there already")
    if isinstance(error, _NO_KEYS):
        return AccessDenied(
            f"{why}: no usable keys ({kind}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, boto.SSLError):
        return TargetError(
            f"{why}: no trusted TLS there; check http or https in AWS_ENDPOINT_URL_S3, and AWS_CA_BUNDLE"
        )
    if isinstance(error, boto.HTTPClientError) and isinstance(error.kwargs.get("error"), ValueError):
        return TargetError(
            f"{why}: the request can't be sent; check AWS_ENDPOINT_URL_S3 and look for line breaks in AWS_ variables"
        )
    if isinstance(error, _NO_ANSWER):
        return StoreUnavailable(f"{why}: no answer ({kind}); run the same again when it is back")
    if isinstance(error, (boto.BotoCoreError, ValueError)):
        return TargetError(f"{why}: {kind}; check the URL, AWS_ENDPOINT_URL_S3, AWS_REGION and AWS_PROFILE")
    return PublishRefused(f"{why}: {kind}, error number {getattr(error, 'errno', None)}")


def _refusal(code: str, status: int, why: str, bucket: str) -> OutliersError:
    """The error for what a server answered; its own message is left out, for who knows what it repeats."""
    said = f"{code} (HTTP {status})" if code != str(status) else f"HTTP {status}"
    if code == "NoSuchKey":
        return _NoSuchKeyError(f"{why}: {said}")
    if code == "PreconditionFailed" or status == 412:
        return _ExistsError(f"{why}: {said}")
    if code in _KEYS_REFUSED:
        return AccessDenied(f"{why}: {said}, {_KEYS_REFUSED[code]}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if code in _BUSY_CODES or status >= 500 or status in (408, 409, 429):
        return StoreUnavailable(f"{why}: {said}; run the same again later")
    if code == "NoSuchBucket" or status == 404:
        return AccessDenied(f"{why}: {said}, there is no bucket '{bucket}'; make it, or correct --publish-to")
    if status in (401, 403):
        return AccessDenied(
            f"{why}: {said}, these keys have no right to do that in the bucket '{bucket}', or there is no such bucket; "
            "publishing needs the rights to list, read and write it"
        )
    if status in (301, 307, 308) or code == "AuthorizationHeaderMalformed":
        return TargetError(f"{why}: {said}, the bucket is in another region; set AWS_REGION")
    return PublishRefused(f"{why}: the server answered {said}")
