"""The thin layer on SkyPilot's SDK: launch, renew, down, status, in seconds and in this project's errors.

Knows no study, no lease and no record: the caller has recorded what it asks for. SkyPilot's SDK talks to a server of
its own on 127.0.0.1, which does the work and outlives this process.

Two promises pull against each other, and SkyPilot 0.14 decides between them by the cloud. A machine must end by itself when
nobody renews: what ends it is a process on the machine, which needs a right to. And no key of a cloud should be copied to
it. AWS, GCP, Azure and Kubernetes give a machine an identity of its own, so there no key goes. Everywhere else (Lambda,
RunPod, ...) the key of that one cloud goes along, since without it the machine would never end. Keys of other clouds are
held back, or the launch is refused where SkyPilot has no setting for it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from outliers.errors import JobFailed, MachineLost, OutliersError, PlanRefused
from outliers.machines.catalog import Candidate, import_sky
from outliers.untrusted.bounds import MESSAGE_CHARS
from outliers.untrusted.visible import cut, visible

State = Literal["launching", "up", "stopped", "gone"]

KEYS_VARIABLE = "OUTLIERS_SKY_KEYS_TRAVEL"
"""1: keys of clouds that SkyPilot has no setting for may be copied to a rented machine of another cloud."""

_SERVER_SECONDS = 180.0
_OFFLINE = "HF_HUB_OFFLINE"
_HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Made a machine, or could not: what to change is the request, the account or the cloud.
_REFUSED = (
    "InvalidCloudConfigs", "InvalidCloudCredentials", "InvalidClusterNameError", "InvalidSkyPilotConfigError",
    "NoCloudAccessError", "NotSupportedError", "ProvisionPrechecksError", "ProvisionUnsupportedError",
    "ResourcesMismatchError", "ResourcesUnavailableError", "UserRequestRejectedByPolicy",
)  # fmt: skip
_LOST = (
    "ApiServerConnectionError", "ClusterDoesNotExist", "ClusterNotUpError", "ClusterStatusFetchingError",
    "FetchClusterInfoError", "NetworkError", "RequestCancelled", "RequestInterruptedError",
    "ServerTemporarilyUnavailableError", "SkyletUnavailableError",
)  # fmt: skip

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A machine as SkyPilot knows it; times in unix seconds, None for what isn't known.

    `autostop_minutes`: it ends by itself this long after the last renewal; None: never. `ends`: whether that removes it
    (or stops it, with a disk that still costs). `price_per_hour`: dollars, of the whole machine.
    """

    name: str
    state: State
    price_per_hour: float | None = None
    launched_at: float | None = None
    autostop_minutes: int | None = None
    ends: bool = False
    cloud: str | None = None
    region: str | None = None
    instance_type: str | None = None


def idle_minutes(seconds: float) -> int:
    """A lease in SkyPilot's unit, rounded up; a machine looks once a minute, so it ends up to two minutes later."""
    return max(1, math.ceil(seconds / 60))


def ssh_alias(name: str) -> str:
    """The Host by which ssh reaches it: SkyPilot's server writes ~/.sky/generated/ssh/NAME, and an Include of that folder
    into ~/.ssh/config. It turns the check of host keys off there."""
    return name


def launch(name: str, wanted: Candidate, seconds: float, say: Callable[[str], None] | None = None) -> Cluster:
    """Rents a machine, or finds the one of that name, and returns when it answers; it ends by itself after `seconds`.

    `say` gets SkyPilot's own lines. PlanRefused where none is available, no cloud is enabled, or a key would travel
    that must not; MachineLost where it was released meanwhile. May take many minutes, and goes on in SkyPilot's server if
    this process dies: `down` ends that too. The machine ends by itself only from the end of the launch on, as SkyPilot
    sets the timer last: until then the caller's record is all that knows of it.
    """
    sky = import_sky()
    with _translated(name):
        start_server()
        if keys := travelling_keys(wanted.row.cloud):
            text = (
                f"SkyPilot would copy keys of other clouds than {wanted.row.cloud} to the machine, and has no setting against "
                f"it: {', '.join(keys)}"
            )
            if os.environ.get(KEYS_VARIABLE) != "1":
                raise PlanRefused(
                    f"{text}; move them away, or allow it with {KEYS_VARIABLE}=1 (for a token of Hugging Face: end "
                    "SkyPilot's server with `sky api stop`, it is started again without)"
                )
            _log.warning("%s (%s=1 allows it)", text, KEYS_VARIABLE)
        settings = identities(wanted.row.cloud)
        if own_key_travels(wanted.row.cloud, settings):
            _log.info("your key of %s goes along to %s, which could not end itself without", wanted.row.cloud, name)
        with _configured(settings), contextlib.redirect_stdout(sys.stderr):
            request = sky.launch(task(wanted, seconds), cluster_name=name, fast=False)
        sky.stream_and_get(request, output_stream=_Lines(say or _log.info))
    found = status(name)
    if found.state != "up":
        raise MachineLost(f"machine {name} was launched, and is {found.state} now")
    return found


def write_ssh_entry(name: str) -> None:
    """Have SkyPilot write how ssh reaches a machine that is up. Its SDK leaves, on Slurm, an entry that leads to the login node
    and not into the allocation; its command mends that, after each launch. JobFailed where it can't."""
    import_sky()
    command = (str(Path(sys.executable).with_name("sky")), "status", name)
    try:
        done = subprocess.run(
            command, cwd=Path.home(), timeout=_SERVER_SECONDS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobFailed(f"`sky status {name}` can't be run: {error}") from error
    if done.returncode:
        raise JobFailed(f"`sky status {name}` failed: {visible(done.stdout[-1000:]).strip()}")


def renew(name: str, seconds: float) -> None:
    """The machine does not end by itself for `seconds` from now, and ends then. MachineLost where it isn't up."""
    sky = import_sky()
    with _translated(name):
        start_server()
        sky.get(sky.autostop(name, idle_minutes(seconds), wait_for=_wait_for_nothing(), down=True))


def down(name: str, wait: bool = True) -> None:
    """Ends a machine and whatever launch of it is under way; one that isn't there is fine. JobFailed where it can't be ended.

    Without `wait` it returns when SkyPilot's server has taken the order, and an error is not seen.
    """
    sky = import_sky()
    with _translated(name):
        start_server()
        # A launch that is still queued has no cluster yet: SkyPilot would not find it, and rent it afterwards.
        active = sky.api_status(cluster_name=name, fields=["request_id", "name", "cluster_name"])
        launches = [one.request_id for one in active if one.cluster_name == name and one.name.endswith("launch")]
        if launches:
            sky.get(sky.api_cancel(launches, silent=True))
        request = sky.down(name)
        if wait:
            with contextlib.suppress(sky.exceptions.ClusterDoesNotExist):
                sky.get(request)


def status(name: str, refresh: bool = True) -> Cluster:
    """What SkyPilot knows of a machine; state `gone` where it knows none. `refresh`: it asks the cloud first."""
    return next(iter(_records([name], refresh)), Cluster(name, "gone"))


def list_clusters(refresh: bool = True) -> tuple[Cluster, ...]:
    """Every machine of this user that SkyPilot knows, by name, also those that other programs launched."""
    return _records(None, refresh)


def _records(names: list[str] | None, refresh: bool) -> tuple[Cluster, ...]:
    sky = import_sky()
    mode = sky.StatusRefreshMode.AUTO if refresh else sky.StatusRefreshMode.NONE
    with _translated(names[0] if names else "SkyPilot"):
        start_server()
        records = sky.get(sky.status(names, refresh=mode))
    return tuple(sorted((parse(record) for record in records), key=lambda one: one.name))


def parse(record: Any) -> Cluster:
    """A record of `sky.status`."""
    handle = record["handle"]
    resources: Any = getattr(handle, "launched_resources", None)
    launchable = resources is not None and resources.is_launchable()
    minutes = record["autostop"]
    # One that is about to end can't be used, and costs until it is gone.
    states: dict[str, State] = {"UP": "up", "INIT": "launching", "STOPPED": "stopped", "AUTOSTOPPING": "stopped"}
    return Cluster(
        name=record["name"],
        state=states[record["status"].value],
        price_per_hour=handle.get_hourly_price() if launchable else None,
        launched_at=record["launched_at"],
        autostop_minutes=minutes if minutes >= 0 else None,
        ends=record["to_down"],
        cloud=str(resources.cloud).lower() if launchable else None,
        region=resources.region if launchable else None,
        instance_type=resources.instance_type if launchable else None,
    )


def task(wanted: Candidate, seconds: float) -> Any:
    """The sky.Task of a launch: a machine that does nothing but end after `seconds`."""
    return import_sky().Task(name="outliers").set_resources(resources(wanted, seconds))


def resources(wanted: Candidate, seconds: float) -> Any:
    """The sky.Resources of a machine: on demand, at no higher price than was asked, with its end set at launch."""
    row = wanted.row
    demands: dict[str, Any] = {
        "infra": f"{row.cloud}/{row.region}" if row.instance_type else row.cloud,
        "accelerators": {row.gpu.name: row.gpu_count} if row.gpu else None,
        "disk_size": wanted.disk_gb,
        "max_hourly_cost": wanted.max_price,
        "use_spot": False,
        # `wait_for` none: our detached job counts as idle, and an open terminal would keep the machine for ever.
        "autostop": {"idle_minutes": idle_minutes(seconds), "down": True, "wait_for": "none"},
    }
    if row.instance_type:
        demands["instance_type"] = row.instance_type
    else:
        # Slurm makes the machine to measure, by default a small one. Its nodes never have quite what their memory is.
        demands |= {"cpus": f"{min(row.cpus, 8)}+", "memory": f"{max(1, row.ram_bytes // (2 << 30))}+"}
    return import_sky().Resources(**demands)


def identities(cloud: str) -> dict[str, dict[str, str]]:
    """SkyPilot's settings for a launch on `cloud` that keep keys here, where it has such a setting."""
    import_sky()
    from sky.utils import registry, schemas

    described: Any = schemas
    properties = described.get_config_schema()["properties"]
    adjustable = [name for name, part in properties.items() if "remote_identity" in part.get("properties", {})]
    settings = {name: {"remote_identity": "NO_UPLOAD"} for name in adjustable}
    if cloud in settings and cloud != "slurm":
        own = registry.CLOUD_REGISTRY[cloud].supports_service_account_on_remote()
        settings[cloud] = {"remote_identity": "SERVICE_ACCOUNT" if own else "LOCAL_CREDENTIALS"}
    return settings


def own_key_travels(cloud: str, settings: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a launch with the `identities` of `cloud` copies its own key to the machine."""
    return settings.get(cloud, {}).get("remote_identity", "LOCAL_CREDENTIALS") == "LOCAL_CREDENTIALS"


def travelling_keys(cloud: str) -> tuple[str, ...]:
    """Files with keys that SkyPilot would copy to a machine of `cloud`, whose own is not among them, despite `identities`."""
    import_sky()
    from sky.adaptors import cloudflare, coreweave, huggingface, vastdata
    from sky.utils import registry

    settings = identities(cloud)
    mounts = [
        other.get_credential_file_mounts()
        for name, other in registry.CLOUD_REGISTRY.items()
        if name != cloud and name not in settings
    ]
    stores = (cloudflare, coreweave, vastdata)
    mounts += [store.get_credential_file_mounts() for store in stores if store.check_storage_credentials()[0]]
    files = {path for found in mounts for path in found.values() if Path(path).expanduser().exists()}
    if not _server_is_offline() and huggingface.get_token():
        files.add(huggingface.HF_TOKEN_PATH)
    return tuple(sorted(files))


def start_server() -> None:
    """Starts SkyPilot's server on this computer if none answers; JobFailed where it does not come up.

    It would copy a token of Hugging Face to every machine if it could check it: so it gets none, and no way to the hub.
    """
    import_sky()
    from sky.server import common

    if not common.is_api_server_local() or _answers(common):
        return
    environment = {key: value for key, value in os.environ.items() if key not in _HUB_TOKENS}
    # It is started with -m: a file called json.py in the folder where the command was typed must not become a module.
    environment |= {_OFFLINE: "1", "PYTHONSAFEPATH": "1"}
    command = (sys.executable, "-c", "import sky; sky.api_start()")
    try:
        done = subprocess.run(
            command, env=environment, cwd=Path.home(), timeout=_SERVER_SECONDS,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobFailed(f"SkyPilot's server can't be started: {error}") from error
    if done.returncode or not _answers(common):
        raise JobFailed(f"SkyPilot's server does not start: {visible(done.stdout[-2000:]).strip()}")


def _answers(common: Any) -> bool:
    common.get_api_server_status_response.cache_clear()
    return bool(common.get_api_server_status().status != common.ApiServerStatus.UNHEALTHY)


def _server_is_offline() -> bool:
    """Whether every server of SkyPilot's on this computer has no way to the Hugging Face hub."""
    from sky.server import common

    found = []
    for process in psutil.process_iter(["cmdline"]):
        if common.API_SERVER_CMD in " ".join(process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                found.append(process.environ().get(_OFFLINE) == "1")
    return bool(found) and all(found)


def _wait_for_nothing() -> Any:
    from sky.skylet.autostop_lib import AutostopWaitFor

    return AutostopWaitFor.NONE


@contextlib.contextmanager
def _configured(settings: dict[str, dict[str, str]]) -> Iterator[None]:
    """SkyPilot's configuration with `settings` over the user's own; it travels to the server with each request."""
    from sky import skypilot_config

    with skypilot_config.override_skypilot_config(settings):
        yield


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    """SkyPilot's errors as ours, about the machine `name`."""
    import requests
    from sky import exceptions

    kinds: dict[str, type[Exception]] = {
        key: kind for key, kind in vars(exceptions).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    refused = tuple(kinds[key] for key in _REFUSED)
    lost: tuple[type[Exception], ...] = (*(kinds[key] for key in _LOST), requests.exceptions.RequestException)
    other: tuple[type[Exception], ...] = (*kinds.values(), RuntimeError, ValueError)
    try:
        yield
    except OutliersError:
        raise
    except kinds["NoCloudAccessError"] as error:
        raise PlanRefused(f"no cloud is enabled: `sky check` says what each needs ({_plain(error)})") from error
    except refused as error:
        tried = "".join(f"; {_plain(cause)}" for cause in getattr(error, "failover_history", ()))
        hint = "; `sky check` says which clouds can be used"
        raise PlanRefused(f"machine {name} can't be rented: {_plain(error)}{tried}{hint}") from error
    except lost as error:
        raise MachineLost(f"machine {name}: {_plain(error)}") from error
    except other as error:
        raise JobFailed(f"machine {name}: {type(error).__name__}: {_plain(error)}") from error


def _plain(error: BaseException) -> str:
    """An error's text without the colours that SkyPilot puts in."""
    return visible(cut(_COLOUR.sub("", str(error)).strip(), MESSAGE_CHARS))


class _Lines(io.TextIOBase):
    """A stream that hands on whole lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > MESSAGE_CHARS:  # a line without an end
            lines, self._rest = [*lines, self._rest], ""
        for line in lines:
            if plain := _COLOUR.sub("", cut(line, MESSAGE_CHARS)).strip():
                self._say(visible(plain))
        return len(text)

    def writable(self) -> bool:
        return True
