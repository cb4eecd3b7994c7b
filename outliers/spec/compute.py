"""ComputeSpec: the part of a StudySpec that says which machine, and for how much."""

from __future__ import annotations

import os
import re
from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from outliers.names import LOCAL
from outliers.spec.part import Part

PROVIDER_VARIABLE = "OUTLIERS_PROVIDER"
DEFAULT_PROVIDER = LOCAL
"""This computer."""

EXECUTOR = re.compile(r"threads(=[1-9][0-9]{0,3})?|dask=[a-z]+://[^\s@]+")
"""What may count. An address has no user or password in it."""


def chosen(name: str) -> str:
    """The provider that `name` means ("": $OUTLIERS_PROVIDER, else local)."""
    return name or os.environ.get(PROVIDER_VARIABLE) or DEFAULT_PROVIDER


class ComputeSpec(Part):
    """Which machine, and for how much; never part of an id."""

    model_config = ConfigDict(title="with options")

    provider: str = Field(
        "",
        description="whose machine: local, ssh (a host of yours), sky (rented) (default: $OUTLIERS_PROVIDER, else local)",
    )
    machine: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9-]{0,47}$",
        description="name of the machine: small letters, digits and - (default: made from the capture's id)",
    )
    host: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@:\[\]-]*$",
        description="for provider ssh: user@host, a name of your ssh configuration, or one of `outliers machines add` "
        "(default: whichever of those fits)",
    )
    region: str | None = Field(None, description="for provider sky: region of the cloud, such as us-east-1")
    gpu_count: int | None = Field(None, ge=0, le=8, description="GPUs to use, 0 to 8 (default: what the machine has)")
    gpu_filter: str | None = Field(None, description="part of the GPU's name, such as A100 or H100")
    min_vram: float | None = Field(None, gt=0, description="memory of each GPU, in GB (10^9 bytes)")
    min_cpu_ram: float | None = Field(None, gt=0, description="the machine's own memory, in GB (10^9 bytes)")
    max_price: float | None = Field(None, gt=0, description="highest price of the whole machine, in dollars an hour")
    max_total_price: float | None = Field(
        None,
        gt=0,
        description="most that the machine may cost in all, in dollars; the study is ended before it costs more",
    )
    disk: float | None = Field(None, gt=0, description="free disk the machine must have, in GB (10^9 bytes)")
    lease_seconds: int = Field(
        1_800,
        ge=10,
        le=86_400,
        description="a machine ends by itself when its lease has not been renewed for this many seconds; a study that runs "
        "renews it all the time",
    )
    grace_seconds: int = Field(
        1_800,
        ge=0,
        le=7 * 86_400,
        description="how long a machine is kept after a failure, for Retry, in seconds; 0: not",
    )
    keep_running: bool = Field(False, description="keep a rented machine after success, for keep_seconds")
    keep_seconds: int = Field(43_200, ge=60, le=7 * 86_400, description="how long keep_running keeps it, in seconds")
    shards: int = Field(
        1,
        ge=1,
        le=64,
        description="machines (provider local: processes) that each read and count a part of the sequences; only summaries "
        "travel, and the whole is exactly that of one machine of the same kind",
    )
    processes: int | None = Field(
        None,
        ge=1,
        le=64,
        description="processes that read the corpus side by side on one machine, each with the model and GPUs of its own; no "
        "bit changes (default: as many as the GPUs and the memory hold, 1 without a GPU)",
    )
    remove_files: bool = Field(
        False, description="for provider ssh: remove the study's files from the host when its lease ends"
    )
    upload_model: bool = Field(
        False, description="send a model that is on this machine to another; without it that is refused"
    )
    schedule: Literal["auto", "whole", "layers"] = Field(
        "auto",
        description="whole loads the whole model; layers a layer at a time, for a model larger than the memory, with the same "
        "result; auto is whole, and layers where that does not fit this computer or an ssh host",
    )
    no_keep_weights: bool = Field(
        False,
        description="for schedule layers and a model of the hub: fetch its files one by one into the workspace, and delete each "
        "after its last layer",
    )
    executor: str = Field(
        "threads",
        description="who counts: threads, threads=N, or dask=ADDRESS for a Dask cluster whose workers mount the workspace",
    )
    workspace: str | None = Field(
        None, description="folder for captures, results and jobs (default: $OUTLIERS_WORKSPACE, else ~/.outliers)"
    )

    @property
    def runs_here(self) -> bool:
        """Whether the study runs on this computer, its shards as processes of it."""
        return chosen(self.provider) == DEFAULT_PROVIDER

    @field_validator("executor")
    @classmethod
    def _known(cls, executor: str) -> str:
        if not EXECUTOR.fullmatch(executor):
            raise ValueError(
                f"'{executor}' is not a valid executor: give threads, threads=N or dask=ADDRESS such as dask=tcp://10.0.0.5:8786"
            )
        return executor
