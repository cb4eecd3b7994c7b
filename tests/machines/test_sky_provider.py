"""Provider `sky` on a cloud of the tests: what is rented when, until when, for how much, and what is given back."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from outliers.errors import BudgetSpent, JobFailed, MachineLost, PlanRefused
from outliers.hardware import GB
from outliers.jobs.jobs import JobSpec
from outliers.machines import lease
from outliers.machines.base import MachineRequest
from outliers.machines.connection import CONFIG_VARIABLE
from outliers.machines.deploy import deploy
from outliers.machines.rentals import KEPT, Rentals
from outliers.machines.sky import LAUNCH_SECONDS
from tests.support.cloud import Cloud
from tests.support.remote import Sshd, needs_sshd

pytestmark = [needs_sshd, pytest.mark.servers]

ASKED = MachineRequest(lease_seconds=1800)


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    environment = {"OUTLIERS_WATCHDOG_SECONDS": "0.2", "OUTLIERS_HEARTBEAT_SECONDS": "0.3"}
    with Sshd(tmp_path_factory.mktemp("cloud") / "a box", environment=environment) as machine:
        yield machine


@pytest.fixture
def cloud(box, tmp_path, monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, str(box.config))
    monkeypatch.setenv("OUTLIERS_PATIENCE_SECONDS", "2")
    made = Cloud(box, tmp_path / "workspace")
    yield made
    for name in list(made.clusters):
        made.down(name)


@pytest.fixture
def records(cloud):
    return Rentals(cloud.workspace)


def history(cloud):
    path = cloud.workspace / "machines" / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def left(records, name="m"):
    return records.get(name).lease_until - time.time()


def ends_in(cloud, name="m"):
    return cloud.ends[name] - time.time()


def spent(records, name, dollars, price=2.0):
    """A machine of that name that has cost so much until now, and is gone."""
    records.begin(name, "sky", "cheap here small", price, "study.before", "t", 60)
    records.mark(name, "up", since=time.time() - dollars / price * 3600)
    records.end(name, "lost")


# Rented


def test_the_record_is_older_than_the_launch_and_renewed_while_it_lasts(cloud, records):
    """A launch that takes longer than the lease is nothing that was forgotten."""
    seen = []

    def slow():
        for _ in range(16):
            rental = records.get("m")
            seen.append((rental.state, rental.place, list(rental.holders), rental.is_over(time.time())))
            time.sleep(0.1)

    cloud.while_launching = slow
    machine = cloud.provider().ensure("m", MachineRequest(lease_seconds=1), "study.run", "a study")
    assert seen == [("launching", "cheap here small", ["study.run"], False)] * 16
    assert machine.price_per_hour == records.get("m").price_per_hour == 2.0
    assert (records.get("m").state, cloud.names("launch")) == ("up", ["cheap here small"])


def test_a_machine_is_found_again_and_its_end_set_again(cloud, records):
    first = cloud.provider().ensure("m", ASKED, "study.run", "a study")
    cloud.ends["m"] = 0.0  # as after a reboot, which voids it
    again = cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert again.instance_id == first.instance_id
    assert cloud.names("launch") == ["cheap here small"]
    assert 1790 < ends_in(cloud) <= 1800
    assert cloud.names("down") == []


def test_what_is_sold_out_is_followed_by_the_next_and_all_of_them_are_told(cloud, records):
    cloud.sold_out = {"cheap"}
    cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert cloud.names("launch") == ["cheap here small", "dear there large"]
    assert (records.get("m").place, records.get("m").price_per_hour) == ("dear there large", 6.0)
    cloud.sold_out = {"cheap", "dear"}
    with pytest.raises(
        PlanRefused, match=r"cheap here small: cheap has none left; dear there large: dear has none left"
    ):
        cloud.provider().ensure("n", ASKED, "study.run", "a study")
    assert (records.get("n"), cloud.names("down")) == (None, ["n"])
    with pytest.raises(
        PlanRefused, match=r"^nothing fits:\n  cheap here small: it does not hold the study.*\n  dear there large: it"
    ):
        cloud.provider().ensure("o", replace(ASKED, among=("another",)), "study.run", "a study")
    assert records.get("o") is None


def test_a_price_that_was_not_the_catalogs_is_written_down(cloud, records):
    class Dearer(Cloud):
        def launch(self, name, wanted, seconds, say=None):
            return replace(super().launch(name, wanted, seconds, say), price_per_hour=2.5)

    dearer = Dearer(cloud.box, cloud.workspace)
    assert dearer.provider().ensure("m", ASKED, "study.run", "a study").price_per_hour == 2.5
    assert records.get("m").price_per_hour == 2.5
    dearer.down("m")


@pytest.mark.parametrize("killed", [False, True])
def test_a_machine_without_what_was_asked_goes_back(cloud, records, killed):
    """Also where this side was killed between the launch and the look at what came."""
    request = replace(ASKED, min_ram_bytes=10**7 * GB)
    cloud.rows = tuple(replace(row, ram_bytes=10**8 * GB) for row in cloud.rows)
    if killed:
        records.begin("m", "sky", "cheap here small", 2.0, "study.run", "a study", 1800)
        cloud.launch("m", cloud.candidates(request)[0][0], 1800)
    with pytest.raises(PlanRefused, match=r"not what was asked, it was given back: 10000000\.0 GB of memory asked"):
        cloud.provider().ensure("m", request, "study.run", "a study")
    assert (cloud.names("down"), cloud.clusters, records.get("m")) == (["m"], {}, None)
    assert history(cloud)[-1]["how"] == "not what was asked"
    assert cloud.names("launch") == ["cheap here small"]


@pytest.mark.parametrize("state", ["gone", "stopped"])
def test_a_lost_machine_is_replaced_by_another(cloud, records, state):
    first = cloud.provider().ensure("m", ASKED, "study.run", "a study")
    if state == "gone":
        cloud.down("m")
    else:
        cloud.change("m", state="stopped")
    second = cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert second.instance_id != first.instance_id
    assert [line["how"] for line in history(cloud)] == ["lost"]
    assert cloud.names("down") == ["m"]  # what is stopped has a disk that costs
    assert records.get("m").state == "up"


# Until when


def test_the_end_is_moved_when_a_quarter_of_the_lease_has_passed(cloud, records, monkeypatch):
    source = cloud.provider()
    source.ensure("m", ASKED, "study.run", "a study")
    before = len(cloud.names("renew"))
    source.hold("m", "study.run", "a study", 1800)
    assert len(cloud.names("renew")) == before
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 460)
    source.hold("m", "study.run", "a study", 1800)
    assert len(cloud.names("renew")) == before + 1
    assert ends_in(cloud) == pytest.approx(left(records), abs=5)


def test_the_end_is_that_of_the_latest_holder_and_comes_nearer_when_that_one_leaves(cloud, records):
    source, other = cloud.provider(), cloud.provider()
    source.ensure("m", ASKED, "study.run", "a study")
    other.ensure("m", replace(ASKED, lease_seconds=600), "other.run", "another")
    assert 1790 < ends_in(cloud) <= 1800
    assert source.leave("m", "study.run") == "m is still held by 1 other runs"
    assert 590 < ends_in(cloud) <= 600
    assert other.leave("m", "other.run").startswith("m is released, it cost $0.0")
    assert (cloud.clusters, records.get("m")) == ({}, None)


def test_a_machine_that_is_kept_ends_when_it_was_said(cloud, records):
    """Also when it is kept for less long than its lease would have lasted."""
    source = cloud.provider()
    source.ensure("m", ASKED, "study.run", "a study")
    source.hold("m", f"study{KEPT}", "a study", 300)
    assert records.get("m").holders[f"study{KEPT}"].process == ""  # no run renews it
    source.leave("m", "study.run")
    assert 290 < ends_in(cloud) <= 300
    assert ends_in(cloud) == pytest.approx(left(records), abs=1)
    # an error keeps it for Retry, at its price
    source.ensure("n", ASKED, "study.run", "a study")
    assert source.leave("n", "study.run", 120) == "n is kept for 2 minutes more, at $2.00 an hour"
    assert 110 < ends_in(cloud, "n") <= 120
    assert records.get("n").holders["study.run"].process == ""


def test_a_released_machine_can_not_be_renewed(cloud, records):
    source = cloud.provider()
    source.ensure("m", ASKED, "study.run", "a study")
    assert cloud.provider().release("m").startswith("m is released")
    with pytest.raises(MachineLost, match="the record of m is gone: it was released meanwhile"):
        source.hold("m", "study.run", "a study", 1800)
    assert cloud.names("renew") == ["m"]
    assert cloud.provider().release("m") == "m is not rented: there is nothing to release"
    assert source.leave("m", "study.run") == "m is not rented"


# For how much


def test_no_lease_goes_beyond_what_is_left_of_the_budget(cloud, records):
    spent(records, "m", 9.5)
    budget = replace(ASKED, max_total_price=10.0)
    cloud.provider().ensure("m", budget, "study.run", "a study")
    assert 880 < left(records) <= 900  # 50 cents, at two dollars an hour
    assert 880 < ends_in(cloud) <= 900
    cloud.provider().ensure("n", budget, "study.run", "a study")
    assert ends_in(cloud, "n") > 1790


def test_nothing_is_rented_once_the_budget_is_spent(cloud, records):
    spent(records, "m", 9.99)
    with pytest.raises(
        BudgetSpent, match=r"m have cost \$9\.99, and --max-total-price allows \$10\.00: no more .* at \$2\.00"
    ):
        cloud.provider().ensure("m", replace(ASKED, max_total_price=10.0), "study.run", "a study")
    assert (cloud.asked, records.get("m")) == ([], None)
    # one that runs is not held on either
    cloud.provider().ensure("m", ASKED, "study.run", "a study")
    with pytest.raises(BudgetSpent):
        cloud.provider().ensure("m", replace(ASKED, max_total_price=10.0), "study.run", "a study")


# Given back


def test_a_cancel_gives_it_back_without_waiting_whatever_its_timer_says(cloud, records):
    source = cloud.provider()
    machine = source.ensure("m", ASKED, "study.run", "a study")
    machine.start(JobSpec("step", ("sleep", "83")))

    def broken():
        raise JobFailed("no answer from the skylet")

    cloud.renewing = broken
    assert "m is being released" in source.leave("m", "study.run", wait=False)
    assert cloud.asked[-2:] == [("renew", "m"), ("down", "m")]
    rental = records.get("m")
    assert (rental.state, rental.is_over(time.time())) == ("releasing", True)
    assert cloud.provider().list() == ()
    assert history(cloud)[-1]["how"] == "gone"
    assert not any("sleep 83" in command for _, command in cloud.box.processes())


def test_what_is_released_while_it_is_opened_is_not_held_there(cloud, records, monkeypatch):
    def released_meanwhile(*words, **options):
        records.end("m", "released")
        return deploy(*words, **options)

    monkeypatch.setattr("outliers.machines.ssh_leases.deploy", released_meanwhile)
    with pytest.raises(MachineLost, match="released meanwhile"):
        cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert records.get("m") is None
    assert lease.read(cloud.folder("m") / "machines" / "m").holders == {}
    assert cloud.names("renew") == []


def test_the_list_is_the_clouds_own(cloud, records):
    for name in ("up", "lost", "outliers-stranger", "outliers-endless", "somebodys"):
        records.begin(name, "sky", "cheap here small", 2.0, "study.run", "a study", 1800)
        records.mark(name, "up")
        cloud.launch(name, cloud.candidates(ASKED)[0][0], 1800)
    for name in ("outliers-stranger", "outliers-endless", "somebodys"):
        records.end(name, "of another workspace")
    del cloud.clusters["lost"]
    records.begin("begun", "sky", "cheap here small", 2.0, "study.run", "a study", -1)
    records.begin("forgotten", "sky", "cheap here small", 2.0, "study.run", "a study", -1)
    records.mark("forgotten", "launching", since=time.time() - LAUNCH_SECONDS - 1)
    cloud.change("outliers-endless", autostop_minutes=None, launched_at=time.time() - LAUNCH_SECONDS + 2)
    now, found = time.time(), {rental.name: rental for rental in cloud.provider().list()}
    # of others' machines only such as are named like ours
    assert set(found) == {"up", "begun", "outliers-stranger", "outliers-endless"}
    assert {line["name"] for line in history(cloud) if line["how"] == "gone"} == {"lost", "forgotten"}
    assert found["begun"].is_over(now)
    assert not found["outliers-stranger"].is_over(now + 10**9)  # its own timer ends it
    assert not found["outliers-endless"].is_over(now)
    assert found["outliers-endless"].is_over(now + 3)
    assert (found["outliers-endless"].price_per_hour, found["outliers-endless"].place) == (2.0, "cheap here")
    assert cloud.provider().release("outliers-endless") == "outliers-endless is released"
    assert "outliers-endless" not in cloud.clusters
