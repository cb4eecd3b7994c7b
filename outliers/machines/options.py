"""Which options belong to which provider. An option of another provider is refused, because it would silently do nothing."""

from __future__ import annotations

from outliers.errors import PlanRefused
from outliers.machines.destination import check_destination
from outliers.machines.providers import PROVIDERS
from outliers.spec import DEFAULT_PROVIDER, ComputeSpec, chosen

TAKEN_BY = {
    "host": ("ssh",),
    "region": ("sky",),
    **dict.fromkeys(
        ("max_price", "max_total_price", "keep_running", "keep_seconds", "remove_files", "upload_model"), ("ssh", "sky")
    ),
}
"""The providers to which an option says something; one that is not here is of all."""


def foreign(compute: ComputeSpec) -> tuple[str, ...]:
    """The fields that were given something else than their default, and that the study's provider does not take."""
    meant = chosen(compute.provider)
    if meant not in PROVIDERS:  # refused by its own name
        return ()
    fields = ComputeSpec.model_fields
    return tuple(
        name
        for name, takers in TAKEN_BY.items()
        if meant not in takers and getattr(compute, name) != fields[name].default
    )


def check_options(compute: ComputeSpec) -> None:
    """PlanRefused where an option is of another provider: each with whose it is, and the provider that takes them all.

    BadInput for a --host that can't be one.
    """
    if compute.host is not None:
        check_destination(compute.host)
    found = foreign(compute)
    if not found:
        return
    meant = chosen(compute.provider)
    each = ", ".join(f"--{name.replace('_', '-')} (for {' or '.join(TAKEN_BY[name])})" for name in found)
    others = [name for name in PROVIDERS if all(name in TAKEN_BY[field] for field in found)]
    remedy = f", or say --provider {' or '.join(sorted(others, reverse=True))}" if others else ""
    default = ", the default," if meant == DEFAULT_PROVIDER and not compute.provider else ""
    raise PlanRefused(
        f"provider {meant}{default} does not take {each}: leave {'it' if len(found) == 1 else 'them'} out{remedy}"
    )
