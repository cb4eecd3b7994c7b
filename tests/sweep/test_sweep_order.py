"""The order of a sweep's children: a limit on how many run, no harm of one failure to the others, all ended with the sweep."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.sweep_children import run_studies
from outliers.errors import HubUnavailable, StoreUnavailable, UnknownModel
from outliers.publish.outcome import Outcome
from outliers.sweep.outcome import Ended, summary
from outliers.sweep.plan import wall_seconds
from outliers.sweep.sweep import NEXT_SECONDS, make_sweep


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeChild:
    """Runs for `lasts` seconds of a Clock, then ends in `state`."""

    def __init__(self, world, study, lasts, state):
        self.world, self.study, self.state, self.until = world, study, state, world.clock() + lasts
        self.cancelled = self.joined = False

    def poll(self):
        if self.world.clock() < self.until:
            return None
        self.world.running.discard(self.study.name)
        reason = "because" if self.state == "failed" else ""
        return Ended(name=self.study.name, model=self.study.spec.model.id, state=self.state, reason=reason)

    def cancel(self):
        self.cancelled = True

    def join(self, seconds):
        assert self.cancelled
        self.joined = True


class World:
    """Starts fake children and records which ran at the same time, and when each began."""

    def __init__(self, lasts=lambda study: 10.0, failing=(), there=(), raising=None):
        self.clock, self.lasts, self.failing, self.there, self.raising = Clock(), lasts, failing, there, raising or {}
        self.running, self.began, self.children, self.told, self.most, self.pairs = set(), {}, [], [], 0, set()

    def start(self, study):
        if study.name in self.raising:
            raise self.raising[study.name]
        self.running.add(study.name)
        self.most = max(self.most, len(self.running))
        self.pairs |= {frozenset((study.name, other)) for other in self.running}
        self.began[study.name] = self.clock()
        state = "failed" if study.name in self.failing else "done"
        self.children.append(FakeChild(self, study, self.lasts(study), state))
        return self.children[-1]

    def look(self, study):
        if study.name not in self.there:
            return None
        return Outcome(
            study_id="s", capture_id="c", title="t", results="r", report="r", published=None, published_bytes=0,
            systematic=[], cached=True,
        )  # fmt: skip

    def tell(self, study, end):
        self.told.append((study.name, None if end is None else end.word))

    def run(self, sweep):
        return run_studies(sweep, self.start, self.tell, self.look, self.clock, self.clock.sleep)


def many(number, parallel, stagger=0, prefix="./m", **more):
    studies = [{"name": f"s{n}", "model": f"{prefix}{n}"} for n in range(number)]
    return make_sweep({"parallel": parallel, "stagger_seconds": stagger, "study": studies, **more}, "many")


@settings(deadline=None)
@given(st.data())
def test_the_planned_time_is_that_of_the_run(data):
    """Against the loop that runs the children, by a clock that is advanced: with shared captures and models of the hub."""
    bases = data.draw(st.lists(st.sampled_from(("./m", "org/m")), min_size=1, max_size=4))
    content = {
        "parallel": data.draw(st.integers(1, 4)),
        "stagger_seconds": data.draw(st.integers(0, 30)),
        "matrix": {"magnitude": [6, 8, 10][: data.draw(st.integers(1, 3))]},
        "study": [{"name": f"s{n}", "model": f"{base}{n}"} for n, base in enumerate(bases)],
    }
    sweep = make_sweep(content, "drawn")
    lasts = {study.name: float(data.draw(st.integers(1, 20))) for study in sweep.studies}
    world = World(lasts=lambda study: lasts[study.name])

    def sleep(seconds):
        """To the next moment at which anything changes: a look that is late would change the order of what follows."""
        moments = [child.until for child in world.children]
        moments += [
            world.began[s.name] + sweep.stagger_seconds for s in sweep.studies if s.from_hub and s.name in world.began
        ]
        world.clock.now = min(moment for moment in moments if moment > world.clock.now)

    run_studies(sweep, world.start, world.tell, world.look, world.clock, sleep)
    assert wall_seconds(sweep, lasts) == world.clock.now
    assert wall_seconds(sweep, {}) == 0


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 5))
def test_never_more_than_asked_run_at_once_and_no_place_stays_empty(lasts, parallel):
    world = World(lasts=lambda study: lasts[int(study.name[1:])])
    ended = world.run(many(len(lasts), parallel))
    assert [end.name for end in ended] == [f"s{n}" for n in range(len(lasts))]
    assert world.most <= parallel
    # when each begins as soon as a place is free
    free = [0.0] * parallel
    for seconds in lasts:
        free.sort()
        free[0] += seconds
    assert world.clock.now <= max(free) + 0.2 * (2 * len(lasts) + 2)


def test_one_failure_does_not_stop_the_others_and_is_told():
    world = World(failing={"s1"}, there={"s3"}, raising={"s2": UnknownModel("no such model")})
    ended = world.run(many(5, 2))
    assert [(end.state, end.cached) for end in ended] == [
        ("done", False),
        ("failed", False),
        ("failed", False),
        ("done", True),
        ("done", False),
    ]
    assert summary(ended) == "2 of 5 studies failed: s1: because; s2: refused: no such model. Done: s0, s3, s4"
    assert ("s3", None) not in world.told, "what is there is not started"
    assert world.told.count(("s4", "done")) == 1


def test_a_hub_or_an_error_nobody_foresaw_leaves_it_to_the_child():
    def look(study):
        raise {"s0": HubUnavailable("silent"), "s1": RuntimeError("odd"), "s2": StoreUnavailable("away")}[study.name]

    world = World()
    world.look = look
    assert [(end.state, end.reason) for end in world.run(many(3, 3))] == [
        ("done", ""),
        ("done", ""),
        ("failed", "away"),
    ]


@pytest.mark.parametrize(
    "odd", [OSError(28, "No space left on device"), UnknownModel("no such model"), ValueError("no JSON")]
)
def test_an_error_of_one_child_is_its_end_and_nobody_elses(odd):
    """At its start (s1), and while it runs (s2), which is then ended, since its result is not needed any more."""
    world = World(raising={"s1": odd})
    begin = world.start

    def start(study):
        child = begin(study)
        if study.name == "s2":
            child.poll = raiser(odd)
        return child

    ended = run_studies(many(5, 2), start, world.tell, world.look, world.clock, world.clock.sleep)
    assert [end.state for end in ended] == ["done", "failed", "failed", "done", "done"]
    assert all(str(odd) in end.reason for end in ended[1:3])
    assert [child.study.name for child in world.children if child.cancelled and child.joined] == ["s2"]
    assert ("s2", "failed") in world.told


def test_a_child_that_can_not_be_ended_leaves_the_others_to_be():
    world = World(lasts=lambda study: 1000.0)

    def sleep(seconds):
        world.children[0].cancel = world.children[1].join = raiser(RuntimeError("the server is odd"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_studies(many(3, 3), world.start, world.tell, world.look, world.clock, sleep)
    assert [child.cancelled for child in world.children] == [False, True, True]
    assert world.children[2].joined


def raiser(error):
    def step(*_):
        raise error

    return step


RENTED = [
    # provider, models in the order of the file, those that are there already; for which one the machine stays, once started
    ("sky", ["a"], set(), {"a-6"}),
    ("local", ["a"], set(), set()),
    # the next is done already, or there is none: nothing to wait for
    ("sky", ["a"], {"a-8"}, set()),
    ("sky", ["a"], {"a-6"}, set()),
    # another model between them in the file
    ("sky", ["a", "b", "again"], set(), {"a-6", "a-8", "again-6", "b-6"}),
    ("sky", ["a", "b", "again"], {"a-8", "again-8", "b-8"}, {"a-6"}),
]


@pytest.mark.parametrize(("provider", "names", "there", "kept"), RENTED)
def test_a_rented_machine_stays_only_for_a_next_study_that_comes_at_once(provider, names, there, kept):
    entries = {
        "a": {"name": "a", "model": "./a"},
        "b": {"name": "b", "model": "./b"},
        "again": {"name": "again", "model": "./a", "label": "again"},
    }
    content = {
        "defaults": {"compute": {"provider": provider}},
        "matrix": {"magnitude": [6, 8]},
        "study": [entries[name] for name in names],
    }
    sweep = make_sweep(content, "rented")
    world = World(there=there)
    world.run(sweep)
    started = [child.study for child in world.children]
    found = {one.name: one.spec.compute for one in started}
    assert {name for name, compute in found.items() if compute.keep_running} == kept
    assert all(found[name].keep_seconds == NEXT_SECONDS for name in kept)
    for one, after in itertools.pairwise(started):
        assert not one.spec.compute.keep_running or after.capture_key == one.capture_key


def test_a_machine_that_is_kept_anyway_is_kept_as_asked():
    compute = {"provider": "sky", "keep_running": True, "keep_seconds": 7200}
    world = World()
    world.run(many(1, 1, matrix={"magnitude": [6, 8]}, defaults={"compute": compute}))
    assert {child.study.spec.compute.keep_seconds for child in world.children} == {7200}


def test_models_of_the_hub_start_apart_and_others_do_not_wait_for_them():
    world = World(lasts=lambda study: 100.0)
    content = [{"model": "org/a"}, {"model": "org/b"}, {"name": "c", "model": "./c"}, {"model": "org/d"}]
    world.run(make_sweep({"parallel": 4, "stagger_seconds": 30, "study": content}, "hub"))
    assert world.began["a"] == world.began["c"] == 0
    assert 30 <= world.began["b"] < 31
    assert 60 <= world.began["d"] < 62


def test_two_studies_of_one_capture_never_run_at_once():
    sweep = make_sweep(
        {"parallel": 4, "matrix": {"magnitude": [6, 8]}, "study": [{"model": "./a"}, {"model": "./b"}]}, "shared"
    )
    world = World()
    world.run(sweep)
    assert world.most == 2
    assert frozenset(("a-6", "b-6")) in world.pairs
    assert not {frozenset(("a-6", "a-8")), frozenset(("b-6", "b-8"))} & world.pairs


def test_whatever_ends_the_sweep_ends_its_children_first():
    world = World(lasts=lambda study: 1000.0)

    def sleep(seconds):
        world.clock.sleep(seconds)
        if world.clock.now > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_studies(many(5, 3), world.start, world.tell, world.look, world.clock, sleep)
    assert [(child.cancelled, child.joined) for child in world.children] == [(True, True)] * 3
