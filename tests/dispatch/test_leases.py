"""What becomes of a machine when a run ends: one way for each kind of end, whatever the provider."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import MappingProxyType

import pytest

from outliers.dispatch.leases import MachineLease
from outliers.dispatch.run import undisturbed
from outliers.dispatch.shard import shard_machine
from outliers.errors import BadInput, BudgetSpent, JobFailed, MachineLost, StoreUnavailable
from outliers.events.event import Event
from outliers.machines.rentals import Rentals
from outliers.study.parts import Shard, machine_name
from outliers.workspace import open_workspace
from tests.counting.test_counting import random_acts
from tests.support import synthetic
from tests.support.runs import quiet_run


class Rented:
    """A machine as far as a lease looks at one."""

    provider, name = "sky", "m"

    def __init__(self, price: float = 2.0) -> None:
        self.price_per_hour = price


class Recorder:
    """A provider that writes down what it is asked; `failing`: raised at the end, `troubles`: by the first renewals."""

    def __init__(self, failing: Exception | None = None, troubles: tuple[Exception, ...] = ()) -> None:
        self.held: list[float] = []
        self.kept = 0.0
        self.left: list[tuple[float, bool]] = []
        self.failing = failing
        self.troubles = list(troubles)

    def hold(self, name, holder, title, seconds):
        if holder.endswith(".kept"):
            self.kept = seconds
            return
        if self.troubles:
            raise self.troubles.pop(0)
        self.held.append(seconds)

    def leave(self, name, holder, keep_seconds=0, wait=True):
        if self.failing:
            raise self.failing
        self.left.append((keep_seconds, wait))
        return "left"


def study(**compute):
    acts, _ = random_acts(1, "bfloat16", sites=("attn_in",), shape=(1, 1, 4), width=8)
    made = synthetic.prepared_for(acts, "bfloat16")
    spec = made.spec.model_copy(update={"compute": made.spec.compute.model_copy(update=compute)})
    return made.model_copy(update={"spec": spec})


OFTEN = {"renew_seconds": 0.02}


def lease_of(source, tmp_path, part=None, *, prepared=None, settings=MappingProxyType({}), **compute):
    """A lease of a run of its own; `settings`: of the lease."""
    return MachineLease(quiet_run(prepared or study(**compute), open_workspace(tmp_path)), source, part, **settings)


def extracted(lease, part="", step="extract"):
    """Tell the listeners of a run that a step got on."""
    suffix = f" {part}" if part else ""
    lease.run.emit(f"extract{suffix}", Event(0.0, "progress", step=f"{step}{suffix}", done=1, total=2))


def end(error, tmp_path, work=False, price=2.0, **compute):
    """(keep_seconds, wait) with which the machine is left when the block ends with `error`."""
    source = Recorder()
    holding = lease_of(source, tmp_path, **compute)
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with expected as raised, holding:
        holding.opened(Rented(price))
        if work:
            extracted(holding)
        if error is not None:
            raise error
    assert error is None or raised.value is error
    # the run goes on without the lease: it neither hears nor ends its steps any more
    known = holding.kept_work
    extracted(holding)
    holding.run.check()
    assert holding.kept_work == known
    (left,) = source.left
    return (source.kept or left[0], left[1])


GRACE, KEEP = {"grace_seconds": 700}, {"keep_running": True, "keep_seconds": 9000}


@pytest.mark.parametrize(
    ("error", "work", "compute", "left"),
    [
        (None, False, GRACE, (0.0, True)),
        (None, True, GRACE | KEEP, (9000.0, True)),
        # cancelled: at once, and without waiting
        (KeyboardInterrupt(), True, GRACE | KEEP, (0.0, False)),
        (SystemExit(143), True, GRACE, (0.0, False)),
        # what may succeed later keeps the machine, also where nothing is journaled yet
        (MachineLost("gone"), False, GRACE, (700.0, True)),
        (StoreUnavailable("silent"), True, GRACE | KEEP, (700.0, True)),
        (MachineLost("gone"), True, {"grace_seconds": 0}, (0.0, True)),
        # what will not, only for what is journaled
        (JobFailed("bug"), True, GRACE, (700.0, True)),
        (JobFailed("bug"), False, GRACE, (0.0, True)),
        (BadInput("no"), False, GRACE | KEEP, (0.0, True)),
        # an error that is not in the tree of errors is not judged: kept
        (ValueError("?"), False, GRACE, (700.0, True)),
        (BudgetSpent("all of it"), True, GRACE | KEEP, (0.0, True)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_end(error, work, compute, left, tmp_path):
    assert end(error, tmp_path, work, **compute) == left


def test_an_error_on_leaving_hides_nothing(tmp_path, caplog):
    source, error = Recorder(MachineLost("no answer")), JobFailed("the step's own")
    holding = lease_of(source, tmp_path)
    with pytest.raises(JobFailed, match="the step's own"), holding:
        raise error
    assert "outliers machines release outliers-" in caplog.text
    with lease_of(source, tmp_path):
        pass  # nor does it make a failure of a success


def test_the_lease_is_renewed_while_the_block_lasts(tmp_path):
    source = Recorder()
    with lease_of(source, tmp_path, settings=OFTEN, lease_seconds=900) as holding:
        holding.opened(Rented())
        until = time.monotonic() + 10
        while len(source.held) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        renewing = f"renew-{holding.name}"
        assert renewing in {thread.name for thread in threading.enumerate()}
    assert len(source.held) >= 3 and set(source.held) == {900.0}
    # nothing is left that could renew
    assert renewing not in {thread.name for thread in threading.enumerate()}


def test_no_trouble_ends_the_renewals(tmp_path, caplog):
    """The thread that renews is what keeps the machine: a full disk on this side, or a library's own error, passes."""
    troubles = (MachineLost("no answer"), OSError(28, "No space left on device"), KeyError("handle"))
    source = Recorder(troubles=troubles)
    with lease_of(source, tmp_path, settings=OFTEN, lease_seconds=900) as holding:
        holding.opened(Rented())
        until = time.monotonic() + 10
        while not source.held and time.monotonic() < until:
            time.sleep(0.01)
    assert source.held
    assert caplog.text.count("could not be renewed") == 3
    assert "No space left on device" in caplog.text


def test_a_renewal_on_its_way_undoes_no_end(tmp_path):
    begun, done = threading.Event(), []

    class Slow(Recorder):
        def hold(self, name, holder, title, seconds):
            begun.set()
            time.sleep(0.5)
            done.append("held")

        def leave(self, name, holder, keep_seconds=0, wait=True):
            done.append("left")
            return "left"

    with lease_of(Slow(), tmp_path, settings=OFTEN) as holding:
        holding.opened(Rented())
        begun.wait(10)
    assert done == ["held", "left"]


def test_a_computer_that_was_asleep_renews_when_it_wakes(tmp_path):
    """Leases run by the system clock, which goes on while a computer sleeps; a wait does not."""
    source, now, looks = Recorder(), [1000.0], [0]

    def clock():
        looks[0] += 1
        return now[0]

    with lease_of(source, tmp_path, settings={"look_seconds": 0.01, "clock": clock}, lease_seconds=900) as holding:
        holding.opened(Rented())
        for asleep, renewals in ((59, 0), (3600, 1), (59, 1), (2, 2)):
            now[0] += asleep
            enough, until = looks[0] + 5, time.monotonic() + 10  # a renewal looks twice
            while looks[0] < enough:
                assert time.monotonic() < until, "it does not look at the clock"
                time.sleep(0.01)
            assert len(source.held) == renewals


def test_only_what_the_machine_itself_has_journaled_keeps_it(tmp_path):
    """Each lease hears the events of all shards."""
    source = Recorder()
    with (
        pytest.raises(JobFailed),
        lease_of(source, tmp_path, Shard(1, 4, 0, 1), **GRACE) as holding,
    ):
        holding.opened(Rented())
        for part in ("2/4", "11/4"):
            extracted(holding, part)
        extracted(holding, "1/4", step="download")
        assert not holding.kept_work
        raise JobFailed("bug")
    assert source.left == [(0.0, True)]
    with lease_of(source, tmp_path, Shard(1, 4, 0, 1), **GRACE) as holding:
        extracted(holding, "1/4")
        assert holding.kept_work


def rental(tmp_path, name, price, hours):
    """A record of a machine that was asked for `hours` ago."""
    rentals = Rentals(tmp_path)
    rentals.begin(name, "sky", "a cloud", price, "run", "a study", 600)
    rentals.mark(name, "up", since=time.time() - 3600 * hours)


def test_no_lease_goes_beyond_the_budget(tmp_path):
    prepared = study(max_total_price=10.0, lease_seconds=1800)
    rental(tmp_path, machine_name(prepared), 4.0, hours=2.25)  # $9 of $10: 15 minutes are left
    with lease_of(Recorder(), tmp_path, prepared=prepared) as holding:
        holding.opened(Rented(4.0))
        assert holding.seconds() == pytest.approx(900, abs=5)
    with lease_of(Recorder(), tmp_path, prepared=prepared) as holding:
        holding.opened(Rented(0.0))
        assert holding.seconds() == 1800


def test_a_spent_budget_ends_the_study_with_the_next_event(tmp_path):
    prepared, source = study(max_total_price=10.0, grace_seconds=900), Recorder()
    rental(tmp_path, machine_name(prepared), 4.0, hours=2.5)
    with (
        pytest.raises(BudgetSpent, match=r"has cost \$10\.00 at \$4\.00 an hour.*\$10\.00: it is released"),
        lease_of(source, tmp_path, prepared=prepared, settings=OFTEN) as holding,
    ):
        holding.opened(Rented(4.0))
        until = time.monotonic() + 10
        while time.monotonic() < until:
            holding.run.check()
            time.sleep(0.01)
    assert source.held == []
    assert source.left == [(0.0, True)]


def test_the_spent_budget_of_a_part_leaves_the_others(tmp_path):
    """Each shard calls every guard of the run, in a thread of its own: a budget ends its own shard and machine alone."""
    prepared, sources = study(max_total_price=10.0, grace_seconds=900), (Recorder(), Recorder())
    rental(tmp_path, f"{machine_name(prepared)}-1of2", 4.0, hours=2.5)
    spent, ended, run = threading.Event(), [], quiet_run(prepared, open_workspace(tmp_path))

    def part(number):
        own = Shard(number, 2, number - 1, number)
        with MachineLease(run, sources[number - 1], own, **OFTEN) as holding:
            holding.opened(Rented(4.0))
            until = time.monotonic() + 10
            while time.monotonic() < until and not (number == 2 and spent.is_set()):
                run.check()
                time.sleep(0.01)
            run.check()
            raise MachineLost("its own trouble")

    def try_part(number):
        try:
            part(number)
        except (BudgetSpent, MachineLost) as error:
            ended.append((number, error))
            spent.set()

    threads = [threading.Thread(target=try_part, args=(number,)) for number in (2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    (first, why), (second, trouble) = ended
    assert (first, type(why), second, type(trouble)) == (1, BudgetSpent, 2, MachineLost)
    assert f"{machine_name(prepared)}-1of2 has cost $10.00" in str(why)
    assert [source.left for source in sources] == [[(0.0, True)], [(900.0, True)]]


def test_what_earlier_machines_of_the_name_cost_counts(tmp_path):
    prepared = study(max_total_price=10.0)
    name = machine_name(prepared)
    rental(tmp_path, name, 4.0, hours=2.0)
    Rentals(tmp_path).end(name, "lost")
    rental(tmp_path, name, 4.0, hours=0.25)
    with lease_of(Recorder(), tmp_path, prepared=prepared) as holding:
        holding.opened(Rented(4.0))
        assert holding.seconds() == pytest.approx(900, abs=5)


@pytest.mark.parametrize("error", [None, MachineLost("gone")])
def test_no_machine_is_kept_beyond_the_budget(tmp_path, error):
    prepared = study(max_total_price=10.0, keep_running=True, keep_seconds=9000, grace_seconds=9000)
    rental(tmp_path, machine_name(prepared), 4.0, hours=2.25)
    keep, _ = end(
        error, tmp_path, max_total_price=10.0, keep_running=True, keep_seconds=9000, grace_seconds=9000, price=4.0
    )
    assert keep == pytest.approx(900, abs=5)


def test_parts_have_names_and_budgets_of_their_own(tmp_path):
    prepared = study(max_total_price=10.0, machine="lab")
    assert machine_name(prepared) == "lab"
    part = Shard(2, 5, 2, 4)
    rental(tmp_path, "lab-2of5", 4.0, hours=0.25)
    with lease_of(Recorder(), tmp_path, part, prepared=prepared) as holding:
        assert holding.name == "lab-2of5"
        holding.opened(Rented(4.0))
        assert holding.seconds() == pytest.approx(900, abs=5)


class Refuses(Recorder):
    """A provider that has a machine of that name, and refuses whatever is asked of it."""

    def list(self):
        return Rentals(self.workspace).all()

    def ensure(self, name, request, holder, title):
        self.asked = request
        raise MachineLost("no")


def test_the_machine_of_a_part_is_asked_for_with_its_share_of_the_budget(tmp_path):
    prepared, part = study(max_total_price=10.0, machine="lab"), Shard(2, 5, 2, 4)
    rental(tmp_path, "lab-2of5", 4.0, hours=0.25)
    source = Refuses()
    source.workspace = tmp_path
    holding = lease_of(source, tmp_path, part, prepared=prepared)
    with pytest.raises(MachineLost):
        shard_machine(holding, part, holding.run.reporter)
    assert source.asked.max_total_price == 2.0


def test_a_second_signal_does_not_break_off_what_the_first_began():
    """Ctrl-C pressed again, or a SIGTERM on top: the end of the job goes on, and afterwards signals are heard as before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="heard"), undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        raise ValueError("heard")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_cancelled_run_leaves_its_machine_undisturbed(tmp_path):
    source = Recorder()

    def leave(name, holder, keep_seconds=0, wait=True):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        source.left.append((keep_seconds, wait))
        return "left"

    source.leave = leave
    with (
        pytest.raises(KeyboardInterrupt, match="first"),
        lease_of(source, tmp_path) as own,
    ):
        own.opened(Rented())
        raise KeyboardInterrupt("first")
    assert source.left == [(0.0, False)]
