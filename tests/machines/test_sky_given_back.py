"""Provider `sky`, where something went wrong: machines that ended unseen, full disks, what is given up while another takes it."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import replace

import pytest

from outliers.errors import DiskFull, MachineLost, OutliersError, PlanRefused
from outliers.hardware import GB
from outliers.machines.deploy import deploy
from outliers.machines.providers import PROVIDERS
from outliers.machines.reap import reap
from outliers.machines.rentals import KEPT
from outliers.workspace import open_workspace
from tests.machines.test_sky_provider import ASKED, box, cloud, ends_in, history, records
from tests.support.remote import needs_sshd

__all__ = ["box", "cloud", "records"]  # fixtures, found by name

pytestmark = [needs_sshd, pytest.mark.servers]

HOURS = 60
WEEKEND = HOURS * 3600.0
HALF = 1800.0
PAID = 2.0 * (HALF + 120) / 3600
"""Dollars of a lease of half an hour at two dollars, and of the two minutes until a timer has looked."""


def ended_unseen(records, name="m", state="up"):
    """A machine that was there for half an hour, sixty hours ago."""
    records.begin(name, "sky", "cheap here small", 2.0, "study.run", "a study", 60)
    since = time.time() - WEEKEND
    records.mark(name, state, since=since, lease_until=since + HALF)


def as_the_provider(cloud, monkeypatch):
    """`flows.cli.machines` meets this cloud; its workspace."""
    monkeypatch.setitem(PROVIDERS, "sky", lambda workspace: cloud.provider())
    return open_workspace(cloud.workspace)


# What it cost


@pytest.mark.parametrize("found", ["ensure", "list", "release", "leave"])
def test_a_machine_that_ended_by_itself_cost_what_its_lease_did(cloud, records, found):
    ended_unseen(records)
    source = cloud.provider()
    said = ""
    if found == "ensure":
        source.ensure("m", replace(ASKED, max_total_price=10.0), "study.run", "a study")
    elif found == "list":
        assert source.list() == ()
    else:
        said = source.release("m") if found == "release" else source.leave("m", "study.run")
        assert said == f"m is released, it cost ${PAID:.2f}"
    (line,) = history(cloud)
    assert line["spent"] == pytest.approx(PAID, abs=0.01)
    assert line["ended"] == pytest.approx(line["since"] + HALF + 120, abs=1)
    assert records.spent("m") == pytest.approx(PAID, abs=0.01)


def test_one_that_is_still_there_costs_until_now(cloud, records):
    """Its timer failed: no lease is an excuse."""
    ended_unseen(records)
    cloud.launch("m", cloud.candidates(ASKED)[0][0], 1800)
    assert cloud.provider().release("m") == f"m is released, it cost ${2.0 * HOURS:.2f}"
    assert history(cloud)[0]["spent"] == pytest.approx(2.0 * HOURS, abs=0.01)


def test_what_was_given_up_and_forgotten_cost_until_then(cloud, records):
    """A cancel only asks for the end; the same command two days later finds the record."""
    ended_unseen(records, state="releasing")
    cloud.provider().ensure("m", replace(ASKED, max_total_price=10.0), "study.run", "a study")
    (line,) = history(cloud)
    assert (line["how"], line["spent"]) == ("released", pytest.approx(PAID, abs=0.01))
    assert cloud.names("down") == []


def test_a_launch_that_nobody_saw_may_have_lasted_an_hour_more(cloud, records):
    ended_unseen(records, state="launching")
    assert cloud.provider().list() == ()
    assert history(cloud)[0]["spent"] == pytest.approx(PAID + 2.0, abs=0.01)


# Installing


@pytest.mark.parametrize("attached", [False, True])
def test_an_installation_that_takes_longer_than_the_lease_ends_no_machine(cloud, records, monkeypatch, attached):
    monkeypatch.setattr("outliers.machines.rentals.RENEW_SECONDS", 0.1)
    source, short = cloud.provider(), replace(ASKED, lease_seconds=2)
    if attached:
        source.ensure("m", ASKED, "study.run", "a study")
        cloud.ends["m"] = time.time() + 0.1
        source = cloud.provider()
    left, begun, before = [], time.monotonic(), len(cloud.names("renew"))

    def slow(*words, **options):
        for _ in range(30):
            left.append(ends_in(cloud))
            time.sleep(0.1)
        return deploy(*words, **options)

    monkeypatch.setattr("outliers.machines.ssh_leases.deploy", slow)
    source.ensure("m", short, "study.run", "a study")
    assert len(left) == 30
    assert min(left) > 0
    # apart from the first and the last, no more often than each quarter of the lease
    assert len(cloud.names("renew")) - before <= (time.monotonic() - begun) / 0.5 + 2


def test_a_machine_that_waits_is_renewed_before_anything_is_installed_on_it(cloud, records):
    """It may be a minute from its end."""
    cloud.provider().ensure("m", ASKED, "study.run", "a study")
    cloud.asked.clear()
    cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert cloud.asked[:2] == [("renew", "m"), ("ssh", "m")]


# A disk that is full here


def fill(monkeypatch):
    def full(*words):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("outliers.machines.rentals.write_atomic", full)
    monkeypatch.setattr("outliers.machines.rentals.append_line", full)


@pytest.mark.parametrize("how", ["leave", "cancel", "release"])
def test_a_full_disk_here_keeps_no_machine(cloud, records, monkeypatch, caplog, how):
    source = cloud.provider()
    source.ensure("m", ASKED, "study.run", "a study")
    fill(monkeypatch)
    said = source.release("m") if how == "release" else source.leave("m", "study.run", wait=how == "leave")
    assert ("m is being released" if how == "cancel" else "m is released") in said
    assert (cloud.names("down"), cloud.clusters) == (["m"], {})
    assert "the record of m stays as it was: the records of machines in" in caplog.text
    monkeypatch.undo()
    assert records.get("m") is not None
    assert cloud.provider().list() == ()  # found gone, once there is room
    assert [line["how"] for line in history(cloud)] == ["gone"]


def test_a_full_disk_here_ends_no_lease_there(cloud, records, monkeypatch):
    source = cloud.provider()
    source.ensure("m", replace(ASKED, lease_seconds=600), "study.run", "a study")
    fill(monkeypatch)
    source.hold("m", "study.run", "a study", 1800)
    assert 1790 < ends_in(cloud) <= 1800
    # what is kept belongs to no run: without a record nothing would show it
    with pytest.raises(DiskFull, match=r"the records of machines in .* can't be written: .*No space left"):
        source.hold("m", f"study{KEPT}", "a study", 9000)
    with pytest.raises(OutliersError, match="No space left"):
        source.leave("m", "study.run", 120)
    assert ends_in(cloud) <= 1800


# Given up by one, taken by another


def test_what_is_being_released_is_waited_for_and_another_is_rented(cloud, records, caplog):
    """Ctrl-C, then the same command: the dying machine is not used."""
    cloud.slow = True
    source = cloud.provider()
    first = source.ensure("m", ASKED, "study.run", "a study")
    source.leave("m", "study.run", wait=False)
    assert (records.get("m").state, cloud.clusters["m"].state) == ("releasing", "up")
    with caplog.at_level("INFO"):
        second = cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert "m (cheap here small) is being released: it is waited for" in caplog.text
    assert second.instance_id != first.instance_id
    assert [call for call in cloud.asked if call[0] in ("launch", "down")] == [
        ("launch", "cheap here small"), ("down", "m"), ("down", "m"), ("launch", "cheap here small"),
    ]  # fmt: skip
    assert [line["how"] for line in history(cloud)] == ["released"]
    assert records.get("m").state == "up"


def test_what_is_given_up_between_the_look_at_it_and_the_hold_is_not_attached_to(cloud, records):
    cloud.provider().ensure("m", ASKED, "study.run", "a study")

    def given_up():
        cloud.looking = lambda: None
        records.mark("m", "releasing")

    cloud.looking = given_up
    cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert (cloud.names("down"), len(cloud.names("launch"))) == (["m"], 2)
    assert records.get("m").state == "up"


def test_what_is_given_up_while_it_is_opened_is_not_marked_up(cloud, records, monkeypatch):
    def given_up(*words, **options):
        records.mark("m", "releasing")
        return deploy(*words, **options)

    monkeypatch.setattr("outliers.machines.ssh_leases.deploy", given_up)
    with pytest.raises(MachineLost, match="m was released while it was opened"):
        cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert records.get("m").state == "releasing"


def test_the_end_of_one_machine_is_not_that_of_the_next_of_its_name(cloud, records):
    """The next is rented as soon as the first is gone, before whoever released it has noted that."""
    source = cloud.provider()
    source.ensure("m", ASKED, "study.run", "a study")

    def taken(name):
        cloud.ended = lambda name: None
        cloud.provider().ensure("m", ASKED, "study.run", "a study")

    cloud.ended = taken
    assert source.release("m").startswith("m is released")
    assert (records.get("m").state, list(cloud.clusters)) == ("up", ["m"])
    assert [line["how"] for line in history(cloud)] == ["released"]


def test_a_cancel_during_the_launch_does_not_wait_for_it(cloud, records):
    def cancelled():
        assert "m is being released" in cloud.provider().leave("m", "study.run", wait=False)
        raise MachineLost("the launch was cancelled")

    cloud.while_launching = cancelled
    with pytest.raises(MachineLost):
        cloud.provider().ensure("m", ASKED, "study.run", "a study")
    assert cloud.asked == [("launch", "cheap here small"), ("down", "m")]


def test_reap_spares_what_was_taken_again_meanwhile(cloud, records, monkeypatch):
    """Retry takes the second while the first one's teardown runs."""
    workspace, source = as_the_provider(cloud, monkeypatch), cloud.provider()
    for name in ("a", "b"):
        source.ensure(name, ASKED, "study.run", "a study")
        records.hold(name, "study.run", "a study", -1)
    cloud.ended = lambda name: name == "a" and cloud.provider().ensure("b", ASKED, "study.retry", "a study")
    done, failed = reap(workspace)
    assert (len(done), failed, cloud.names("down")) == (1, [], ["a"])
    assert done[0].startswith("a is released")
    assert (records.get("b").state, list(cloud.clusters)) == ("up", ["b"])
    records.hold("b", "study.run", "a study", -1)
    records.hold("b", "study.retry", "a study", -1)
    assert reap(workspace)[0][0].startswith("b is released")


def test_a_full_disk_here_keeps_reap_from_nothing(cloud, records, monkeypatch):
    workspace = as_the_provider(cloud, monkeypatch)
    cloud.provider().ensure("m", ASKED, "study.run", "a study")
    records.hold("m", "study.run", "a study", -1)
    fill(monkeypatch)
    done, failed = reap(workspace)
    assert (failed, cloud.clusters) == ([], {})
    assert done[0].startswith("m is released")


# What came, and what is asked at all


def test_a_disk_smaller_than_the_study_needs_goes_back(cloud, records):
    """Some clouds give what they have, whatever was asked."""
    with pytest.raises(PlanRefused, match=r"given back: the study needs 10000000\.0 GB of disk, [\d.]+ GB is free"):
        cloud.provider().ensure("m", replace(ASKED, needed_disk_bytes=10**7 * GB), "study.run", "a study")
    assert (cloud.clusters, records.get("m")) == ({}, None)


def test_nothing_is_asked_where_nothing_was_ever_rented(cloud, records):
    """SkyPilot would start its server for it. A machine of that name is found all the same when it is to be used."""
    assert cloud.provider().list() == ()
    records.begin("h", "ssh", "lab1", 0.0, "study.run", "a study", 60)
    assert (cloud.provider().list(), cloud.looked) == ((), 0)
    records.begin("m", "sky", "cheap here small", 2.0, "study.run", "a study", 60)
    cloud.provider().list()
    records.end("m", "released")
    cloud.provider().list()
    assert cloud.looked == 2
    (records.folder / "history.jsonl").unlink()
    (records.folder / "broken.json").write_text("{")  # of whom?
    cloud.provider().list()
    assert cloud.looked == 3


def test_the_history_survives_a_line_that_a_full_disk_left_torn(cloud, records):
    records.begin("m", "sky", "cheap here small", 2.0, "study.run", "a study", 60)
    (records.folder / "history.jsonl").write_text('{"name": "m", "spe')
    records.end("m", "released")
    _, line = (records.folder / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["how"] == "released"
