"""A bucket (s3://) as an artifact store, through aiobotocore.

Keys, region and endpoint come from the environment, as AWS's own tools read them. Every call ends within CALL_SECONDS
(plus the time that its bytes need), however the server fails. Nothing is remembered between two uses: a retry sees the
current state of the bucket. Only a target s3:// imports this module, because aiobotocore belongs to the extra `flows`.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import http.client
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import get_loop, sync
from fsspec.exceptions import FSTimeoutError

from outliers.errors import AccessDenied, OutliersError, PublishRefused, StoreUnavailable, TargetError
from outliers.files.beneath import LISTED
from outliers.publish.stores.base import LISTED_BELOW, MAX_OBJECT_BYTES, Children, Stored, create_in_order, too_many

CONNECT_SECONDS = 4
READ_SECONDS = 5
ATTEMPTS = 2
"""A silent server is waited for twice, 5 s each. The flow makes further tries and shows them."""
CALL_SECONDS = 14.0
SLOWEST_BYTES_PER_SECOND = 200_000
"""A put may take CALL_SECONDS plus the time of its bytes at this rate. Without this limit it never ends on a server that
accepts a connection and reads nothing: measured with 1 MB and a stopped weed 4.48, aiohttp does not bound sending."""
_CONFIG = AioConfig(
    connect_timeout=CONNECT_SECONDS,
    read_timeout=READ_SECONDS,
    retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
)

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


def report_unless_a_request_does(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an error that no task awaits: a broken connection is left to the request that it broke.

    aiohttp sends a body in a task of its own and does not await it when the connection breaks. asyncio would print that
    task's traceback next to the error that the request itself raises. Any other error is reported as usual.
    """
    if not isinstance(context.get("exception"), (aiohttp.ClientError, ConnectionError)):
        loop.default_exception_handler(context)


class BucketStore:
    """Objects of `bucket` below `prefix`, for one use (`open.opened` closes it). Threads may share it.

    No call takes longer than `call_seconds`, except a put, which also gets the time of its bytes.
    """

    def __init__(self, url: str, bucket: str, prefix: str, call_seconds: float = CALL_SECONDS) -> None:
        self.url = url
        self._call_seconds = call_seconds
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._open = contextlib.AsyncExitStack()
        self._opening = asyncio.Lock()
        self._client: Any = None
        self._loop = get_loop()
        self._loop.call_soon_threadsafe(self._loop.set_exception_handler, report_unless_a_request_does)

    def close(self) -> None:
        with contextlib.suppress(FSTimeoutError):
            sync(self._loop, self._open.aclose, timeout=1)

    def check(self) -> None:
        self._call("list", "", lambda s3: s3.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1))
        # Starting and aborting an upload asks for the right to write and leaves no object.
        where = self._where(f".probe-{secrets.token_hex(8)}")
        started = self._call("write", "", lambda s3: s3.create_multipart_upload(**where))
        with contextlib.suppress(AccessDenied, PublishRefused):
            upload = started["UploadId"]
            self._call("write", "", lambda s3: s3.abort_multipart_upload(**where, UploadId=upload))

    def read(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        async def read_some(s3: Any) -> tuple[bytearray, int]:
            """At most one byte more than the limit, and the size that the server reports."""
            answer = await s3.get_object(**self._where(key))
            body, data = answer["Body"], bytearray()
            try:
                # Closing the body ends the connection, so that the server sends no more than is read.
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
        self._write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, data, IfNoneMatch="*")
        except _ExistsError:
            return False
        return True

    def create_with(self, files: Mapping[str, bytes], key: str, data: bytes) -> bool:
        return create_in_order(self, files, key, data)

    def list(self, prefix: str) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        page: dict[str, str] = {}
        while True:
            answer = self._page(prefix, page)
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
            answer = self._page(prefix, {"Delimiter": "/", **page})
            folders += [row["Prefix"].removeprefix(below).rstrip("/") for row in answer.get("CommonPrefixes", ())]
            files += [name for row in answer.get("Contents", ()) if (name := row["Key"].removeprefix(below))]
            if not answer.get("IsTruncated") or len(folders) + len(files) > LISTED:
                return Children(folders, files, [], whole=len(folders) + len(files) <= LISTED)
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._call("remove", key, lambda s3: s3.delete_object(**self._where(key)))

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _page(self, prefix: str, asked: dict[str, str]) -> Any:
        where = {"Bucket": self._bucket, "Prefix": self._prefix + prefix, **asked}
        return self._call("list", prefix, lambda s3: s3.list_objects_v2(**where))

    def _write(self, key: str, data: bytes, **condition: str) -> None:
        seconds = self._call_seconds + len(data) / SLOWEST_BYTES_PER_SECOND
        self._call("write", key, lambda s3: s3.put_object(**self._where(key), Body=data, **condition), seconds)

    async def _connected(self) -> Any:
        """The one client of this store."""
        async with self._opening:
            if self._client is None:
                # botocore itself reads AWS_DEFAULT_REGION only; AWS's other tools read AWS_REGION first.
                region = os.environ.get("AWS_REGION") or None
                self._client = await self._open.enter_async_context(
                    get_session().create_client("s3", region_name=region, config=_CONFIG)
                )
        return self._client

    def _call(self, doing: str, key: str, ask: Callable[[Any], Awaitable[Any]], seconds: float = 0) -> Any:
        """What `ask`, given the client, answers within `seconds` (0: `call_seconds`); its errors become those of the tree."""

        async def answered() -> Any:
            return await ask(await self._connected())

        async def limited() -> Any:
            # wait_for cancels the call; a timeout of `sync` alone would leave it running.
            return await asyncio.wait_for(answered(), seconds or self._call_seconds)

        try:
            return sync(self._loop, limited)
        except (OSError, ValueError, boto.BotoCoreError, boto.ClientError, *_NO_ANSWER) as error:
            url = f"{self.url}/{key}" if key else self.url
            raise _translated(error, doing, url, self._bucket) from error


class _NoSuchKeyError(PublishRefused):
    """The object is not there."""


class _ExistsError(PublishRefused):
    """The object to create is there already."""


def _server() -> str:
    """Host and port of the endpoint; the rest of its URL may hold a secret."""
    parts = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    return parts.netloc.rpartition("@")[2] or "AWS S3"


def _translated(error: Exception, doing: str, url: str, bucket: str) -> OutliersError:
    why = f"could not {doing} {url} at {_server()}"
    kind = type(error).__name__
    if isinstance(error, boto.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _refusal(code, status, why, bucket)
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
    """The error for a server's answer, without the server's own message, which may repeat a secret."""
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
