"""Events as a file and at the terminal: torn lines, progress that is thinned, loggers, a full disk. No job is started."""

import io
import logging

import pytest

from outliers.events import stream as events
from outliers.events.stream import ConsoleReporter, JsonReporter, send_logs_to


def test_a_torn_last_line_waits_for_its_end(tmp_path):
    path = tmp_path / "events.jsonl"
    assert events.read(path) == ([], 0)
    whole = b'{"t": 1, "kind": "log", "message": "a"}\n{"t": 2, "kind": "log", "message": "b", "newer": []}\n'
    path.write_bytes(whole + b'{"t": 3, "kind"')
    found, offset = events.read(path)
    assert [event.message for event in found] == ["a", "b"] and offset == len(whole) == found[-1].end
    assert events.read(path, offset) == ([], offset)
    with path.open("ab") as file:
        file.write(b': "log", "message": "c"}\n')
    found, offset = events.read(path, offset)
    assert [event.message for event in found] == ["c"] and offset == path.stat().st_size


def test_what_a_killed_writer_tore_costs_no_other_event(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"t": 1, "kind": "log", "mess')
    JsonReporter(path).log("info", 'says "{\\"t\\": 5}" itself')
    (torn, good), offset = events.read(path)
    assert torn.level == "warning" and '"mess' in torn.message and torn.end == 29
    assert good.message == 'says "{\\"t\\": 5}" itself' and good.end == offset == path.stat().st_size
    assert events.read(path, torn.end) == ([good], offset)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_any_chunk_reads_the_same(tmp_path, chunk_bytes):
    path = tmp_path / "events.jsonl"
    reporter = JsonReporter(path)
    for i in range(30):
        reporter.log("info", f"{i}" * i)
    seen, offset = [], 0
    while found := events.read(path, offset, chunk_bytes)[0]:
        offset = found[-1].end
        seen += found
    assert [event.message for event in seen] == [f"{i}" * i for i in range(30)]


def test_progress_is_thinned_but_its_end_is_kept(tmp_path):
    reporter = JsonReporter(tmp_path / "events.jsonl")
    for done in range(1, 1001):
        reporter.progress("capture", done, 1000, "sequences")
    found = events.read(tmp_path / "events.jsonl")[0]
    assert 2 <= len(found) < 50 and found[0].done == 1
    assert (found[-1].step, found[-1].done, found[-1].total, found[-1].unit) == ("capture", 1000, 1000, "sequences")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_console_progress_has_a_rate_and_the_time_left():
    now, plain, terminal = [0.0], io.StringIO(), Terminal()
    reporters = [ConsoleReporter(stream, clock=lambda: now[0]) for stream in (plain, terminal)]
    # 20 of 100 were done before this process: 2 a second since, and 76 left take 38 s.
    for second, done in ((0.0, 20), (0.5, 21), (2.0, 24), (40.0, 100)):
        now[0] = second
        for reporter in reporters:
            reporter.progress("capture", done, 100, "sequences")
    reporters[1].log("warning", "careful")
    shown = plain.getvalue().splitlines()
    assert len(shown) == 3 and "24 sequences of 100 sequences  2 sequences/s  0:38 left" in shown[1]
    assert "100%" in shown[2] and "left" not in shown[2]
    assert terminal.getvalue().count("\n") == 2 and terminal.getvalue().endswith("\nwarning: careful\n")


def test_the_loggers_of_the_package_reach_the_reporter(tmp_path):
    logger = logging.getLogger("outliers_test_events")
    for _ in range(2):  # the second replaces the first: no line twice
        send_logs_to(JsonReporter(tmp_path / "events.jsonl"), logger.name)
    logger.debug("no")
    logger.getChild("part").info("yes %d", 1)
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("failed")
    found = events.read(tmp_path / "events.jsonl")[0]
    assert [(event.level, event.message.splitlines()[0]) for event in found] == [("info", "yes 1"), ("error", "failed")]
    assert "KeyError: 'lost'" in found[1].message


def test_a_full_disk_ends_no_step():
    reporter = JsonReporter("/dev/full")
    reporter.log("info", "lost")
    reporter.progress("capture", 1, 2, "sequences")
