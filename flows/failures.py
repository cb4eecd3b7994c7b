"""How an error of this project is shown in Prefect: one line, in the place of a traceback.

An `OutliersError` says what was given, what is allowed and what to do; where in the code it was raised helps nobody. Any other
exception is a defect, and keeps its traceback. Prefect logs both alike, so its loggers get a filter.
"""

from __future__ import annotations

import logging
from typing import Any

from prefect import State
from prefect.exceptions import FailedRun, MissingContextError
from prefect.logging import get_run_logger
from prefect.states import Failed

from outliers.errors import OutliersError

LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
"""Where Prefect says that a flow or a task raised something."""


_AGAIN = "Engine execution exited with unexpected exception"
"""What Prefect's process of a run says of an error that its flow has ended with: nothing that was not said."""


class WithoutTraceback(logging.Filter):
    """Takes the traceback off the record of an error of this project, or of a run that has failed with one. The message has
    the error already; the record that only says that there was one is left out."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is kept."""
        if (
            record.exc_info
            and isinstance(record.exc_info[1], (OutliersError, FailedRun))
            and record.levelno > logging.DEBUG
        ):
            record.exc_info, record.exc_text = None, None
            return record.msg != _AGAIN
        return True


_FILTER = WithoutTraceback()


def quiet_tracebacks() -> None:
    """From now on Prefect's loggers in this process show no traceback of an OutliersError. May be repeated."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)


def failed_with(error: OutliersError) -> State[Any]:
    """The state of a flow run that ends with this error: its message is the error's, and nothing else.

    To be returned by the flow. Who called the flow in this process gets the error itself.
    """
    try:
        logger = get_run_logger()
    except MissingContextError:  # no run: the flow's function was called by itself
        raise error from None
    logger.error("%s", error)
    logger.debug("where it was raised:", exc_info=(type(error), error, error.__traceback__))
    return Failed(message=str(error), data=error)
