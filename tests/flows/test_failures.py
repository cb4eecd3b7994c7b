"""What Prefect's loggers and a flow's state say of an error of this project, and of a defect."""

from __future__ import annotations

import logging
import sys

import pytest

from flows.failures import LOGGERS, quiet_tracebacks
from outliers.errors import BadInput, StoreUnavailable


def logged(error: Exception, message: str, level: int = logging.ERROR) -> str | None:
    """What a handler of Prefect's logger gets to write of a raised error; None where the record is left out."""
    logger = logging.getLogger(LOGGERS[0])
    try:
        raise error
    except type(error):
        record = logger.makeRecord(logger.name, level, __file__, 1, message, (error,), sys.exc_info())
    return logging.Formatter().format(record) if logger.filter(record) else None


@pytest.mark.parametrize("error", [BadInput("give --gpu-count 1"), StoreUnavailable("it did not answer")])
def test_an_error_of_ours_has_one_line(error):
    quiet_tracebacks()
    quiet_tracebacks()
    assert logged(error, "it failed: %s") == f"it failed: {error}"
    assert logging.getLogger(LOGGERS[0]).filters.count(logging.getLogger(LOGGERS[0]).filters[-1]) == 1


def test_a_defect_keeps_its_traceback_and_debugging_has_every_one():
    quiet_tracebacks()
    assert "Traceback" in logged(KeyError("x"), "it failed: %r")
    assert "Traceback" in logged(BadInput("no"), "where: %r", logging.DEBUG)
