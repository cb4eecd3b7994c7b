"""Which tests are slow: `make test-times` measures all of them and writes slow.txt, which `make test-fast` leaves out.

Counted is the processor's time of a test function with all of its parameters, its fixtures and the children that it waited
for: the wall clock says more of the machine than of the test. A new test counts as fast until it is measured.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

SLOW = Path(__file__).with_name("slow.txt")
SLOW_SECONDS = 1.2

_used: Counter[str] = Counter()


def function_of(nodeid: str) -> str:
    """A test without its parameters."""
    return nodeid.partition("[")[0]


def _processor_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[_BEGAN] = _processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor_seconds", _processor_seconds() - item.stash[_BEGAN]))


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        _used[function_of(report.nodeid)] += dict(report.user_properties).get("processor_seconds", 0.0)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        SLOW.write_text("".join(f"{name}\n" for name, used in sorted(_used.items()) if used >= SLOW_SECONDS))


_BEGAN = pytest.StashKey[float]()
