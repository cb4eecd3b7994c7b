"""The records of what was rented: from their beginning to their end, and with many writers at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outliers import errors
from outliers.machines import lease
from outliers.machines.rentals import Rentals, gone_by

ROOT = Path(__file__).resolve().parents[2]
FAST = {lease.POLL_VARIABLE: "0.1"}


class Clock:
    """What `time` is to the records."""

    now = 1000.0

    def time(self):
        return self.now


def begin(rentals, name="m1", holder="run-1", seconds=60.0, price=2.0, place="lab1"):
    return rentals.begin(name, "ssh", place, price, holder, "a study", seconds)


def test_a_record_from_its_beginning_to_its_end(tmp_path):
    rentals = Rentals(tmp_path)
    made = begin(rentals)
    assert (made.state, rentals.get("m1"), rentals.all("ssh"), rentals.all("sky")) == ("launching", made, (made,), ())
    assert rentals.mark("m1", "up", price_per_hour=3.0).price_per_hour == 3.0
    again = begin(rentals, holder="run-2", seconds=600, price=7.0, place="lab2")
    assert (again.since, again.state, again.price_per_hour, again.place) == (made.since, "up", 7.0, "lab2")
    assert set(again.holders) == {"run-1", "run-2"}
    assert again.lease_until == again.holders["run-2"].until > made.lease_until
    left = rentals.leave("m1", "run-2")
    assert left.lease_until == left.holders["run-1"].until == made.lease_until
    assert rentals.hold("m1", "run-1", "new title", 90).lease_until > left.lease_until
    assert rentals.leave("m1", "run-1").is_over(time.time())
    rentals.end("m1", "released")
    rentals.end("m1", "released")
    assert rentals.get("m1") is rentals.hold("m1", "r", "t", 9) is rentals.leave("m1", "r") is rentals.mark("m1", "up")
    assert rentals.get("m1") is None
    assert rentals.all() == ()
    (line,) = (tmp_path / "machines/history.jsonl").read_text().splitlines()
    assert json.loads(line) | {"name": "m1", "how": "released", "price_per_hour": 7.0} == json.loads(line)


def test_a_place_is_chosen_by_price_then_by_what_is_taken_then_by_name(tmp_path):
    rentals, places = Rentals(tmp_path), {"c": 1.0, "b": 1.0, "a": 2.0}

    def chosen(name, places, provider="ssh"):
        return rentals.begin_at_one(name, provider, places, "run", "a study", 60).place

    assert [chosen(f"m{number}", places) for number in range(4)] == ["b", "c", "b", "c"]
    assert chosen("m4", {"b": 3.0, "c": 1.0, "a": 2.0}) == "c"
    # one that is recorded meanwhile stays where it is, at what that place costs; where it can't be, another is taken
    assert chosen("m4", {"a": 0.5, "c": 1.5}) == "c"
    assert rentals.get("m4").price_per_hour == 1.5
    assert chosen("m4", {"a": 0.5}) == "a"
    # another provider's machines take none of these places
    begin(rentals, "m5", place="c")
    assert chosen("n1", {"b": 1.0, "c": 1.0}, "other") == "b"


def test_what_was_spent_counts_those_that_have_ended(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("outliers.machines.rentals.time", clock)
    rentals = Rentals(tmp_path)
    assert rentals.spent("m1") == 0
    begin(rentals, price=2.0)
    clock.now += 1800
    assert rentals.spent("m1") == 1.0
    rentals.end("m1", "lost")
    clock.now += 9999
    assert rentals.spent("m1") == 1.0
    with (tmp_path / "machines/history.jsonl").open("a") as history:
        history.write('{"name": "m1", "spe\n')  # a crash tore it
    begin(rentals, price=10.0)
    begin(rentals, "m2", price=99.0)
    clock.now += 360
    assert rentals.spent("m1") == pytest.approx(2.0)


def test_what_is_past_its_lease_is_taken_once_and_only_while_it_is(tmp_path):
    rentals = Rentals(tmp_path)
    begin(rentals, seconds=-5)
    taken = rentals.take_overdue("m1")
    assert (taken.state, rentals.get("m1"), taken.is_over(time.time())) == ("releasing", taken, True)
    assert rentals.mark("m1", "up", unless="releasing") is None
    assert rentals.get("m1") == taken
    begin(rentals, holder="run-2")
    assert rentals.take_overdue("m1") is rentals.take_overdue("m9") is None


def test_only_the_machine_that_is_meant_is_ended_and_as_it_was_gone(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("outliers.machines.rentals.time", clock)
    rentals = Rentals(tmp_path)
    made = begin(rentals, seconds=3600)
    clock.now += 7 * 24 * 3600
    rentals.end("m1", "released", since=made.since - 1)
    assert rentals.get("m1") == made
    rentals.end("m1", "gone", since=made.since, latest=gone_by(made))
    line = json.loads((tmp_path / "machines/history.jsonl").read_text())
    assert (line["ended"], line["spent"]) == (made.lease_until + 120, pytest.approx(2.0 * 3720 / 3600, abs=1e-4))
    assert (rentals.ever("ssh"), rentals.ever("sky")) == (True, False)


def test_a_disk_that_takes_no_record_is_an_error_of_ours(tmp_path):
    """/dev/full takes nothing; a file where the folder should be is another trouble."""
    (tmp_path / "machines").mkdir()
    (tmp_path / "machines/history.jsonl").symlink_to("/dev/full")
    rentals = Rentals(tmp_path)
    begin(rentals)
    with pytest.raises(errors.DiskFull, match=r"records of machines in .*machines can't be written: .*No space left"):
        rentals.end("m1", "released")
    assert rentals.get("m1") is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other/machines").write_text("a file")
    with pytest.raises(errors.WorkspaceError, match="can't be written"):
        begin(Rentals(tmp_path / "other"))


def test_whose_holding_is_needless(tmp_path):
    """What killed runs of this computer left, and ended ones of the same study; never what was kept as asked."""
    rentals = Rentals(tmp_path)
    for holder in ("one.kept", "one.ended", "two.ended", "two.alive"):
        begin(rentals, holder=holder)
        rentals.hold("m1", holder, "t", 60, alive=holder == "two.alive")
    code = (
        "import sys; from pathlib import Path; from outliers.machines.rentals import Rentals\n"
        "Rentals(Path(sys.argv[1])).begin('m1', 'ssh', 'lab1', 1.0, 'two.killed', 't', 60)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, timeout=30)
    assert set(rentals.superseded("m1", "one.new")) == {"one.ended", "two.killed"}
    assert set(rentals.superseded("m1", "three.new")) == {"two.killed"}
    elsewhere = json.loads((rentals.folder / "m1.json").read_text())
    elsewhere["holders"]["two.killed"]["process"] = "another-computer 1 1.00"
    (rentals.folder / "m1.json").write_text(json.dumps(elsewhere))
    assert rentals.superseded("m1", "three.new") == ()
    assert rentals.superseded("m9", "one.new") == ()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "m1"}', '{"name": "m1", "holders": {"a": {}}}'])
def test_a_record_that_can_not_be_read_is_named(tmp_path, text):
    rentals = Rentals(tmp_path)
    begin(rentals)
    other = begin(rentals, "m2")
    (rentals.folder / "m1.json").write_text(text)
    with pytest.raises(errors.WorkspaceError, match=r"machines/m1\.json is not a record of a machine"):
        rentals.get("m1")
    # it hides no other, and an error reports it
    assert rentals.all() == (other,)
    (told,) = rentals.unreadable()
    assert told.startswith(f"{rentals.folder / 'm1.json'} is not a record of a machine")


@pytest.mark.servers
def test_writers_in_several_processes_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from outliers.machines.rentals import Rentals\n"
        "rentals, me = Rentals(Path(sys.argv[1])), sys.argv[2]\n"
        "for i in range(15):\n"
        "    rentals.begin('m1', 'ssh', 'lab1', 1.0, f'{me}-{i}', 't', 60)\n"
        "    rentals.begin(f'own-{me}-{i}', 'ssh', 'lab1', 1.0, me, 't', 60)\n"
        "    rentals.end(f'own-{me}-{i}', 'released')\n"
        "    if i % 3 == 0: rentals.leave('m1', f'{me}-{i}')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(me)], cwd=ROOT) for me in range(4)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    (left,) = Rentals(tmp_path).all()
    assert set(left.holders) == {f"{me}-{i}" for me in range(4) for i in range(15) if i % 3}
    lines = [json.loads(line) for line in (tmp_path / "machines/history.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(f"own-{me}-{i}" for me in range(4) for i in range(15))
    assert not list((tmp_path / "machines").glob("*.part"))


@pytest.mark.parametrize("field", ["lease_until", "since", "price_per_hour"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '"soon"', "null", "true", "[]", "1" * 400])
def test_a_record_with_a_time_that_is_none_is_told_and_not_believed(tmp_path, field, value):
    """Compared with NaN nothing is over, so nothing would end what it tells of."""
    rentals = Rentals(tmp_path)
    begin(rentals, "m1")
    begin(rentals, "m2")
    path = tmp_path / "machines" / "m1.json"
    record = json.loads(path.read_text()) | {field: "@"}
    path.write_text(json.dumps(record).replace('"@"', value))
    assert [rental.name for rental in rentals.all()] == ["m2"]
    (said,) = rentals.unreadable()
    assert "m1.json is not a record of a machine" in said
    with pytest.raises(errors.WorkspaceError):
        rentals.hold("m1", "run-1", "t", 60)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{", "[" * 100_000, '{"holders": []}', '{"holders": {"a": 1}}', '{"holders": {"a": {}}}'],
)
def test_a_record_that_is_none_hides_no_other(tmp_path, content):
    rentals = Rentals(tmp_path)
    begin(rentals, "m2")
    (tmp_path / "machines" / "m1.json").write_text(content)
    (tmp_path / "machines" / "m3.json").mkdir()
    assert [rental.name for rental in rentals.all()] == ["m2"]
    assert len(rentals.unreadable()) == 2


def test_a_time_that_no_lease_reaches_is_over(tmp_path):
    """The clock was set back by a month: what was rented before must not cost for that month."""
    rentals = Rentals(tmp_path)
    made = begin(rentals, seconds=3600)
    assert not made.is_over(made.since)
    assert made.is_over(made.since - 30 * 86_400)
    assert not begin(rentals, seconds=lease.MAX_SECONDS).is_over(made.since)


def test_a_history_that_is_damaged_is_counted_as_far_as_it_can_be_read(tmp_path):
    rentals = Rentals(tmp_path)
    begin(rentals)
    rentals.end("m1", "released")
    with (tmp_path / "machines" / "history.jsonl").open("ab") as file:
        file.write(
            b'[]\nnull\n\xff{\n{"name": "m1", "spent": NaN}\n{"name": "m1", "spent": "7"}\n{"name": "m1", "spent": 3.5}\n'
        )
    assert 3.5 <= rentals.spent("m1") < 3.6
    assert rentals.was_held("m1")
    assert not rentals.was_held("m")
    assert rentals.ever("ssh")
    assert not rentals.ever("sky")
