"""What the step `provision` asks a provider for: the whole plan, but for a machine that it has already."""

from __future__ import annotations

import time

import pytest

from outliers.dispatch.leases import MachineLease
from outliers.dispatch.steps import provision_machine
from outliers.machines.base import Holder, Rental
from outliers.machines.local import LocalProvider
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.parts import machine_name
from outliers.study.prepare import prepare
from tests.support import tiny
from tests.support.runs import quiet_run


class Asked(LocalProvider):
    """This computer, with the record of a machine in some state; it keeps what it is asked for."""

    def __init__(self, workspace, *known):
        super().__init__(workspace)
        self.known, self.requests = known, []

    def list(self):
        return self.known

    def ensure(self, name, request, holder, title):
        self.requests.append(request)
        return super().ensure(name, request, holder, title)


def record(name, state):
    now = time.time()
    return Rental(name, "sky", "cheap here", state, 2.0, now, now + 60, {"run": Holder("a study", now + 60)})


@pytest.mark.parametrize(("state", "is_had"), [(None, False), ("launching", False), ("releasing", False), ("up", True)])
def test_a_machine_whose_launch_failed_is_chosen_by_the_whole_plan_again(tmp_path, workspace, state, is_had):
    """The record is older than the machine: a retry of a launch that failed must not rent one that fits nothing."""
    folder = tiny.make_model(tmp_path / "model")
    prepared = prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", 4, 32)), workspace)
    name = machine_name(prepared)
    source = Asked(workspace.root, *([record(name, state)] if state else []))
    run = quiet_run(prepared, workspace)
    provision_machine(MachineLease(run, source), run.reporter)
    (request,) = source.requests
    demand = demand_of(prepared.spec, prepared.model)
    layout = demand.layout.total_bytes
    assert request.needed_disk_bytes >= (0 if is_had else layout)
    assert (request.needed_disk_bytes < layout) == is_had
    assert request.needed_ram_bytes == demand.ram_bytes
