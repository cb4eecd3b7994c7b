"""Several hosts of a user's: which one a study gets, and what becomes of it when that one is lost."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from outliers.errors import BadInput, MachineLost, PlanRefused
from outliers.machines.base import MachineRequest
from outliers.machines.rentals import Rentals
from outliers.machines.ssh import Host, Hosts, SshProvider
from outliers.machines.ssh_leases import Access
from tests.support.remote import Sshd, needs_sshd

pytestmark = [pytest.mark.servers, needs_sshd]
ASKED = MachineRequest(lease_seconds=120)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Two hosts, `a` and `b`, at one price, and a workspace that knows them."""
    monkeypatch.setenv("OUTLIERS_PATIENCE_SECONDS", "2")
    workspace = tmp_path / "ws"
    with Sshd(tmp_path / "a", "a") as a, Sshd(tmp_path / "b", "b") as b:
        config = tmp_path / "config"
        config.write_text(a.config.read_text() + b.config.read_text())
        monkeypatch.setenv("OUTLIERS_SSH_CONFIG", str(config))
        for name in ("a", "b"):
            Hosts(workspace).add(Host(name, name, python=sys.executable, price_per_hour=1.0))
        yield workspace, a, b


def place(workspace, name):
    return Rentals(workspace).get(name).place


@pytest.mark.studies
def test_parts_of_equal_price_are_spread(lab):
    workspace, _, _ = lab
    provider = SshProvider(workspace)
    for name in ("m-1of4", "m-2of4", "m-3of4", "m-4of4"):
        provider.ensure(name, ASKED, f"study.{name}", "a part")
    assert [place(workspace, f"m-{n}of4") for n in (1, 2, 3, 4)] == ["a", "b", "a", "b"]
    Hosts(workspace).add(Host("b", "b", python=sys.executable, price_per_hour=0.5))
    assert [offer.name for offer in provider.offers(ASKED)[0]] == ["b", "a"]


def test_parts_that_begin_at_once_are_spread(lab):
    """Each has a thread and a provider of its own: all have looked at the hosts before the first has one."""
    workspace, _, _ = lab
    names, together = [f"m-{number}of4" for number in (1, 2, 3, 4)], threading.Barrier(4)

    class AtOnce(SshProvider):
        def offers(self, request):
            found = super().offers(request)
            together.wait(60)
            return found

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: AtOnce(workspace).ensure(name, ASKED, f"study.{name}", "a part"), names))
    assert sorted(place(workspace, name) for name in names) == ["a", "a", "b", "b"]


def test_hosts_are_asked_at_once_and_told_in_their_order(lab, monkeypatch):
    """Each answers only once all have been asked."""
    workspace, _, _ = lab
    together, ask = threading.Barrier(3, timeout=30), Access.probe
    Hosts(workspace).add(Host("aa", "a", python=sys.executable, price_per_hour=9.0))

    def probe(self):
        together.wait()
        if self.connection.destination == "b":
            raise MachineLost("b can't be reached")
        return ask(self)

    monkeypatch.setattr(Access, "probe", probe)
    offers, excluded = SshProvider(workspace).offers(MachineRequest(max_price=5.0))
    assert [offer.name for offer in offers] == ["a"]
    assert [(one.name, "$9 an hour" in one.reason or one.reason) for one in excluded] == [
        ("aa", True),
        ("b", "b can't be reached"),
    ]


def test_a_host_that_is_lost_gives_way_to_another(lab, caplog):
    workspace, a, _ = lab
    first = SshProvider(workspace).ensure("m", ASKED, "study.run", "a study")
    assert place(workspace, "m") == "a"
    a.stop()
    first.connection.close()
    second = SshProvider(workspace).ensure("m", ASKED, "study.run", "a study")
    assert place(workspace, "m") == "b"
    assert second.instance_id != first.instance_id
    assert "a, which has m, is lost" in caplog.text
    assert '"how": "lost"' in (workspace / "machines" / "history.jsonl").read_text()


def test_a_host_that_is_asked_for_by_name_is_not_replaced(lab):
    workspace, a, _ = lab
    pinned = MachineRequest(lease_seconds=120, host="a")
    provider = SshProvider(workspace)
    machine = provider.ensure("m", pinned, "study.run", "a study")
    with pytest.raises(BadInput, match=r"m is on a until its lease ends, and --host says b: release it first"):
        provider.ensure("m", MachineRequest(lease_seconds=120, host="b"), "study.run", "a study")
    a.stop()
    machine.connection.close()
    with pytest.raises(MachineLost, match="a can't be reached"):
        SshProvider(workspace).ensure("m", pinned, "study.run", "a study")
    # one that is redirected elsewhere follows
    SshProvider(workspace).ensure("m", MachineRequest(lease_seconds=120, host="b"), "study.run", "a study")
    assert place(workspace, "m") == "b"


def test_the_only_host_is_kept_for_when_it_answers_again(lab):
    """What is journaled there is all that there is: its record is not given up for a host that does not exist."""
    workspace, a, _ = lab
    Hosts(workspace).remove("b")
    machine = SshProvider(workspace).ensure("m", ASKED, "study.run", "a study")
    a.stop()
    machine.connection.close()
    with pytest.raises(MachineLost, match="a can't be reached"):
        SshProvider(workspace).ensure("m", ASKED, "study.run", "a study")
    assert place(workspace, "m") == "a"
    assert not (workspace / "machines" / "history.jsonl").exists()


def test_only_offers_that_hold_the_study_are_taken(lab):
    workspace, _, _ = lab
    provider = SshProvider(workspace)
    provider.ensure("m", MachineRequest(lease_seconds=120, among=("b",)), "study.run", "a study")
    assert place(workspace, "m") == "b"
    with pytest.raises(PlanRefused, match=r"^no host fits: a: it does not hold the study.*; b: it does not"):
        provider.ensure("n", MachineRequest(lease_seconds=120, among=("c",)), "study.run", "a study")
