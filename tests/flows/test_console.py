"""Standard error of a study at a terminal: how long a phase takes, no time left before there is a rate, what ran or not."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from flows.cli.command import nothing_ran
from flows.cli.console import RATE_SECONDS, Remaining, Steps, next_commands
from outliers.errors import AccessDenied, BadInput, StoreUnavailable, UnknownModel
from outliers.events.event import Event
from outliers.publish.outcome import Outcome


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(file=shown, force_terminal=True, width=width, markup=False, emoji=False, color_system=None), shown


def lines_of(shown: io.StringIO) -> list[str]:
    """All that was ever drawn, a line each, without the terminal's commands."""
    return [
        line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").split("\n") if line
    ]


def test_a_phase_without_a_count_shows_its_message_and_its_time():
    console, shown = terminal()
    steps = Steps(console)
    with steps.shown():
        steps.listen("extract", Event(0, "log", message="dequantizing a model, once " + "x" * 200))
        time.sleep(1.3)
    drawn = [line for line in lines_of(shown) if "dequantizing" in line and line.rstrip().endswith("0:00:01")]
    assert drawn and max(map(len, drawn)) <= 80


def test_a_message_is_one_line_where_there_is_no_terminal():
    shown = io.StringIO()
    console = Console(file=shown, markup=False, emoji=False)
    steps, message = Steps(console), "one pass over 16 sequences " * 8
    with steps.shown():
        steps.listen("extract", Event(0, "log", message=message.strip()))
    assert shown.getvalue() == f"  extract: {message.strip()}\n"


def test_no_time_is_left_before_there_is_a_rate():
    clock = [0.0]
    bars = Progress(Remaining(), get_time=lambda: clock[0], disable=True)
    step = bars.add_task("extract", total=100)

    def shown_after(seconds: float, done: int) -> str:
        clock[0] = seconds
        bars.update(step, completed=done)
        return str(Remaining().render(bars.tasks[0]))

    early = [shown_after(share * RATE_SECONDS, 1 + int(9 * share)) for share in (0.2, 0.5, 0.9)]
    assert early == ["", "", ""]
    # 10 a rate's time so far, 80 are left
    assert shown_after(2 * RATE_SECONDS, 20) == "40 s left"
    assert shown_after(10 * RATE_SECONDS, 100) == ""


def test_steps_that_speak_at_once():
    console, _ = terminal()
    steps = Steps(console)

    def speak(number: int) -> None:
        for _ in range(200):
            steps.listen(f"part {number}", Event(0, "log", message="loading"))

    failed: list[BaseException] = []
    threads = [threading.Thread(target=lambda n=n: _kept(failed, speak, n)) for n in range(4)]
    with steps.shown():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def _kept(failed, function, *arguments) -> None:
    try:
        function(*arguments)
    except KeyError as error:
        failed.append(error)


@pytest.mark.parametrize(
    "error", [AccessDenied("no key"), StoreUnavailable("no answer"), UnknownModel("no such model")]
)
def test_what_fails_before_anything_ran_is_refused(error):
    with pytest.raises(BadInput, match=str(error)), nothing_ran():
        raise error


def outcome(**changed) -> Outcome:
    own = {
        "study_id": "3f2a91c05d6e7b84", "capture_id": "0" * 16, "title": "tiny 2x8", "results": "r", "report": "r/report.html",
        "published": None, "published_bytes": 0, "systematic": [], "cached": False,
    }  # fmt: skip
    return Outcome(**(own | changed))


def test_next_commands_go_on_from_what_is_there():
    first = next_commands(outcome(systematic=[{"feature": 247}]), "/tmp/a place")
    assert first == [
        "outliers runs show 3f2a91c05d6e7b84 --feature 247 --workspace '/tmp/a place'",
        "outliers probe 3f2a91c05d6e7b84 --check --workspace '/tmp/a place'",
    ]
    probed = next_commands(outcome(verdict="int8 costs nothing"), None)
    assert [command.split()[1] for command in probed] == ["runs", "advise", "export"]
