"""What crosses the pipe between the processes of a capture, and how their results are added."""

from __future__ import annotations

import json
import os

import pytest

from outliers.capture.channel import as_error, as_message
from outliers.capture.together import summed
from outliers.errors import MemoryFull, PlanRefused

ERRORS = [
    (MemoryFull("the forward pass has no memory left"), MemoryFull),
    (PlanRefused("too small"), PlanRefused),
    (MemoryError("unable to allocate 3 GiB"), MemoryError),
    (OSError(28, "No space left on device", "/w/c.0"), OSError),
]


@pytest.mark.parametrize(("error", "kind"), ERRORS)
def test_an_error_crosses_the_pipe_as_itself(error, kind):
    again = as_error(json.loads(json.dumps(as_message(error))))
    assert type(again) is kind
    assert str(again) == str(error)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_what_only_a_traceback_explains_has_no_message():
    assert as_message(ZeroDivisionError("x")) is None


def test_results_are_added_and_the_slowest_pass_decides_the_rate():
    one = {
        "sequences": 2,
        "bytes": 5,
        "gpus": 1,
        "ring_bytes": 7,
        "tokens": 30,
        "seconds": 9.0,
        "download_seconds": 0.0,
    }
    one |= {"load_seconds": 4.0, "ring_waited_seconds": 0.5, "process": 1, "device": "NVIDIA A100", "of_sequences": 6}
    found = summed([one, one | {"seconds": 14.0, "tokens": 20}], 15.0)
    assert found | {"sequences": 4, "tokens": 50, "gpus": 2, "bytes": 10, "ring_bytes": 14} == found
    assert (found["tokens_per_second"], found["seconds"], found["processes"]) == (5.0, 15.0, 2)
    assert (found["process"], found["device"]) == (os.getpid(), "NVIDIA A100")


# Processes without a model
