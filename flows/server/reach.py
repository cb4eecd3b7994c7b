"""Whether the Prefect server that the user configured can be used, checked within seconds before a flow begins.

Prefect itself retries for minutes, and then shows a traceback. Here a server that does not answer, that refuses the
credentials, or that is not Prefect gives one line each.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from flows.server.loopback import bypass_proxies
from outliers.errors import BadInput

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
"""A server that is there may be slow: one that many studies share, on few cores."""
AGAIN_SECONDS = 1.0
"""A server that does not answer is asked a second time after so long: it may just be starting again."""

_SOURCE = "PREFECT_API_URL, or a profile or file of Prefect's, names it (`prefect config view`)"
_OWN = "or unset PREFECT_API_URL, and the command starts a server of its own"


def check_server() -> None:
    """Ask the server of Prefect's settings. BadInput, in one line, where no flow can run there.

    Where the settings name none, nothing is asked: Prefect starts one then, if it may.
    """
    settings = _settings()
    url = (settings.api.url or "").rstrip("/")  # a sweep hands its server's address on with one
    if not url:
        if not settings.server.ephemeral.enabled:
            raise BadInput(
                "no Prefect server is named, and PREFECT_SERVER_EPHEMERAL_ENABLED says that none may be started: set "
                "PREFECT_API_URL, or unset that"
            )
        return
    bypass_proxies(url)
    shown = _shown(url)
    cloud = url.startswith(settings.cloud.api_url)
    with _client(settings, shown) as client:
        if cloud:
            _check_status(client.post(f"{url}/flows/count", json={}), shown)
            return
        answer = _first_answer(client, f"{url}/health", shown)
        _check_status(answer, shown)
        if _json(answer) is not True:
            raise _not_prefect(shown)
        version = client.get(f"{url}/admin/version")
    _check_status(version, shown)
    _check_version(_json(version), shown)


def check_settings() -> None:
    """BadInput where Prefect's settings can't be read."""
    _settings()


def _settings() -> Any:
    """Prefect's settings. BadInput where they can't be read."""
    from pydantic import ValidationError

    try:
        # read as soon as Prefect is imported
        from prefect.settings import get_current_settings

        return get_current_settings()
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False, include_input=False)
        where = ".".join(str(part) for part in first["loc"]) or "a setting"
        raise BadInput(f"Prefect's settings can't be used: {where}: {first['msg']} (`prefect config view`)") from error


def _client(settings: Any, shown: str) -> Any:
    """An httpx client that says who asks, as Prefect's does. BadInput where address or proxies can't be used at all."""
    import httpx

    scheme = shown.partition("://")[0]
    if scheme not in ("http", "https") or not urlsplit(shown).hostname:
        raise BadInput(f"{shown} is not an address of a Prefect server: http://HOST:PORT/api; {_SOURCE}")
    headers = dict(settings.client.custom_headers)
    auth: tuple[str, str] | None = None
    if settings.api.auth_string is not None:
        user, _, password = settings.api.auth_string.get_secret_value().partition(":")
        auth = (user, password)
    elif settings.api.key is not None:
        headers["Authorization"] = f"Bearer {settings.api.key.get_secret_value()}"
    verify: Any = not settings.api.tls_insecure_skip_verify
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    try:
        return _Asking(httpx.Client(headers=headers, auth=auth, verify=verify, timeout=timeout), shown)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise BadInput(
            f"the proxies that this shell names can't be used ({error}): see HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"
        ) from error


class _Asking:
    """A client whose every question ends in an answer or in BadInput."""

    def __init__(self, client: Any, shown: str) -> None:
        self._client, self._shown = client, shown

    def __enter__(self) -> _Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, url: str) -> Any:
        return self._ask("GET", url)

    def post(self, url: str, json: object) -> Any:
        return self._ask("POST", url, json=json)

    def _ask(self, method: str, url: str, **more: Any) -> Any:
        import httpx

        try:
            return self._client.request(method, url, **more)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            raise BadInput(
                f"no Prefect server answers at {self._shown} ({str(error) or type(error).__name__}); {_SOURCE}. Start it "
                f"(`make ui`, `prefect server start`), {_OWN}"
            ) from error


def _first_answer(client: _Asking, url: str, shown: str) -> Any:
    try:
        return client.get(url)
    except BadInput:
        time.sleep(AGAIN_SECONDS)
        return client.get(url)


def _check_status(answer: Any, shown: str) -> None:
    if answer.status_code in (401, 403):
        raise BadInput(
            f"the Prefect server at {shown} refuses these credentials (HTTP {answer.status_code}): PREFECT_API_AUTH_STRING must "
            "be what the server has in PREFECT_SERVER_API_AUTH_STRING (of `make ui`: what is in the file that it names; Prefect "
            "Cloud: PREFECT_API_KEY)"
        )
    if answer.status_code >= 500:
        raise BadInput(
            f"the Prefect server at {shown} is not well (HTTP {answer.status_code}): look at its log; {_OWN}"
        )
    if answer.status_code != 200:
        raise _not_prefect(shown, f" (HTTP {answer.status_code})")


def _check_version(version: object, shown: str) -> None:
    import prefect

    if not isinstance(version, str):
        raise _not_prefect(shown)
    if version.partition(".")[0] != prefect.__version__.partition(".")[0]:
        raise BadInput(
            f"the server at {shown} is Prefect {version}, this is {prefect.__version__}: the first number must be the same"
        )


def _json(answer: Any) -> object:
    try:
        return answer.json()
    except ValueError:
        return None


def _not_prefect(shown: str, more: str = "") -> BadInput:
    return BadInput(
        f"what answers at {shown} is no Prefect server{more}; {_SOURCE}. Its address ends in /api; correct it, {_OWN}"
    )


def _shown(url: str) -> str:
    """The address without a user and password, which it may hold."""
    before, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{before}{mark}{host.rpartition('@')[2]}{slash}{path}"
