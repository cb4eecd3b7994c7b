"""What a command hands to its flow, and what hooks keep of a run, belongs to that flow and that run alone."""

from __future__ import annotations

import threading
from uuid import uuid4

from flows.hooks import live
from flows.observers import observed, on_study


def test_an_observer_is_seen_where_it_was_set_and_nowhere_else():
    seen, both = {}, threading.Barrier(2)

    def run_flow(name):
        with observed(on_study, lambda run: seen.setdefault(name, []).append(run)):
            both.wait(10)
            on_study.get()(name)  # as the body of the flow does, in the context of its caller
            both.wait(10)
        on_study.get()(f"{name} after its end")

    threads = [threading.Thread(target=run_flow, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    on_study.get()("nobody observes")
    for thread in threads:
        thread.join(20)
    assert seen == {"one": ["one"], "other": ["other"]}


def test_hooks_of_one_run_find_nothing_of_another():
    one, other = uuid4(), uuid4()
    live.begin(one, 7).ended_by_us = True
    live.begin(other)
    assert (live.known(one).lock_file, live.known(other).lock_file) == (7, None)
    assert not live.known(other).ended_by_us
    live.known(one).over.set()
    assert not live.known(other).over.is_set()
    again = live.begin(one, 8)
    assert (again.lock_file, again.ended_by_us, again.over.is_set()) == (8, False, False), "an earlier attempt is gone"
    live.forget(one)
    live.forget(other)
    assert (live.known(one), live.known(other)) == (None, None)
