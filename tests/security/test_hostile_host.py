"""A host that was taken over: whatever it answers, this side ends with an error that names it, and obeys nothing of it.

Events, records and results as they come, and how they are shown; `test_hostile_answers` asks over ssh.
"""

from __future__ import annotations

import io
import json
import re
import time

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from outliers import errors
from outliers.events import stream as events
from outliers.events.event import Event
from outliers.jobs import jobs
from outliers.machines.answers import parse_result
from outliers.untrusted import bounds
from outliers.untrusted.visible import code, markdown, visible
from tests.security.hostile import ACTS, DEEP, ESCAPES, LONG, line

# Events


MALFORMED = {
    "no JSON": b"\x80\xff{]\n",
    "nested": DEEP.encode() + b"\n",
    "nested in a field": b'{"t": 1, "kind": "log", "x": ' + DEEP.encode() + b"}\n",
    "a list": b"[1, 2]\n",
    "a string": b'"text"\n',
    "null": b"null\n",
    "no time": b'{"kind": "log"}\n',
    "no kind": b'{"t": 1}\n',
    "time NaN": b'{"t": NaN, "kind": "log"}\n',
    "time infinite": b'{"t": Infinity, "kind": "log"}\n',
    "time 1e999": b'{"t": 1e999, "kind": "log"}\n',
    "time 1e30": line(t=1e30),
    "time negative": line(t=-1),
    "time a string": line(t="1"),
    "time true": line(t=True),
    "kind a list": line(kind=["log"]),
    "kind empty": line(kind=""),
    "kind long": line(kind="k" * 5000),
    "level unknown": line(level="fatal"),
    "level an object": line(level={}),
    "message a list": line(message=["x"]),
    "message null": line(message=None),
    "step a number": line(kind="progress", step=7),
    "step long": line(kind="progress", step="s" * 5000),
    "done negative": line(kind="progress", done=-1),
    "done of 5,000 digits": b'{"t": 1, "kind": "progress", "done": ' + LONG.encode() + b"}\n",
    "done 2^63": line(kind="progress", done=1 << 63),
    "done a float": line(kind="progress", done=1.5),
    "done true": line(kind="progress", done=True),
    "total a string": line(kind="progress", total="all"),
    "total negative": line(kind="progress", total=-5),
    "unit a list": line(kind="progress", unit=[]),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_event_is_a_warning_and_the_next_one_is_read(tmp_path, text):
    (bad,) = events.parse_line(text, 77)
    assert (bad.kind, bad.level, bad.end) == ("log", "warning", 77)
    assert bad.message.startswith("unreadable event: ") and len(bad.message) < 2000
    assert not ACTS.search(bad.message)
    path = tmp_path / "events.jsonl"
    path.write_bytes(text + line())
    found, offset = events.read(path)
    assert [event.message for event in found][1:] == ["fine"] and offset == path.stat().st_size


def test_events_of_a_newer_version_pass(tmp_path):
    (event,) = events.parse_line(line(kind="temperature", degrees={"gpu": [71.5]}), 5)
    assert (event.kind, event.message, event.end) == ("temperature", "fine", 5)


def test_a_line_of_many_torn_events_costs_no_stack_and_no_minute():
    began = time.monotonic()
    found = events.parse_line(b'{"t": ' * 150_000, 900_000)
    assert 1 < len(found) < 50 and found[-1].end == 900_000
    assert time.monotonic() - began < 20


def test_text_of_events_is_visible_and_bounded():
    text = f"[/red]{ESCAPES}{{}} %s\n\tkept\ud800"
    (event,) = events.parse_line(line(message=text, step=f"a\n{ESCAPES}", unit="\x1b", kind="log\x00"), 1)
    for shown in (event.message, event.step, event.unit, event.kind):
        assert not ACTS.search(shown)
    assert "\\x1b[31m" in event.message and "\n\tkept" in event.message and "\n" not in event.step
    (event,) = events.parse_line(line(message="m" * 200_000), 1)
    assert len(event.message) < bounds.MESSAGE_CHARS + 50 and event.message.endswith("... (cut)")


@pytest.mark.parametrize("ended", [True, False])
def test_a_line_without_end_in_a_file_is_not_held(tmp_path, ended):
    path = tmp_path / "events.jsonl"
    path.write_bytes(line() + b"x" * (5 * bounds.LINE_BYTES) + (b"\n" + line(message="after") if ended else b""))
    found, offset = [], 0
    while more := events.read(path, offset)[0]:
        offset = more[-1].end
        found += more
    assert [event.message[:20] for event in found[:2]] == ["fine", "unreadable event: xx"]
    assert [event.message for event in found[2:]] == (["after"] if ended else [])
    assert all(len(event.message) < 2000 for event in found)
    assert offset == path.stat().st_size


# Records of a job

HOSTILE_RECORDS = {
    "nested": DEEP,
    "a list": "[1]",
    "signal of 5,000 digits": f'{{"signal": {LONG}}}',
    "signal a list": '{"signal": [9]}',
    "signal negative": '{"signal": -9}',
    "memory of 400 digits": '{"signal": 9, "ram_bytes": ' + "9" * 400 + "}",
    "memory negative": '{"signal": 9, "ram_bytes": -1}',
    "code NaN": '{"code": NaN}',
    "code an object": '{"code": {"a": [1]}}',
    "error of lists": '{"code": 1, "error": {"kind": ["x"], "message": {"y": 1}}}',
    "error with escapes": json.dumps({"code": 1, "error": {"kind": f"Bad\n{ESCAPES}", "message": ESCAPES}}),
    "error long": json.dumps({"code": 1, "error": {"kind": "k" * 10**6, "message": "m" * 10**6}}),
}


@pytest.mark.parametrize("text", HOSTILE_RECORDS.values(), ids=HOSTILE_RECORDS)
def test_a_hostile_record_of_a_jobs_end_is_an_error_of_ours(tmp_path, text):
    folder = tmp_path / "jobs" / "extract-1" / "0001"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    (folder / "exit.json").write_text(text)
    with pytest.raises(errors.OutliersError) as caught:
        jobs.result(folder)
    assert len(str(caught.value)) < 2 * bounds.MESSAGE_CHARS
    assert not ACTS.search(str(caught.value))


HOSTILE_RESULTS = {
    "nested": DEEP.encode(),
    "a list": b"[]",
    "not UTF-8": b'{"a": "\xff"}',
    "NaN": b'{"seconds": NaN}',
    "1e999": b'{"seconds": 1e999}',
    "5,000 digits": b'{"bytes": ' + LONG.encode() + b"}",
    "2^64": b'{"bytes": 18446744073709551616}',
    "many": json.dumps({"a": list(range(5000))}).encode(),
    "large": b'{"a": "' + b"x" * (2 << 20) + b'"}',
    "digest a list": b'{"results_digest": [1]}',
    "digest a path": b'{"results_digest": "../../x"}',
    "empty": b"",
}


@pytest.mark.parametrize("data", HOSTILE_RESULTS.values(), ids=HOSTILE_RESULTS)
def test_a_hostile_result_of_a_step_is_refused(data):
    with pytest.raises(errors.JobFailed, match="job extract-1 left no readable result: ") as caught:
        parse_result(data, "extract-1")
    assert len(str(caught.value)) < 1000


def test_text_in_the_result_of_a_step_is_visible():
    found = parse_result(json.dumps({"device": ESCAPES, f"k{ESCAPES}": [1, 2.5, None, True]}).encode(), "j")
    assert not ACTS.search(json.dumps(found, ensure_ascii=False))
    assert found["device"] == visible(ESCAPES) and [1, 2.5, None, True] in found.values()


# What is shown


def shown(*told: Event) -> str:
    from flows.cli.console import Steps

    out = io.StringIO()
    for terminal in (True, False):
        console = Console(file=out, force_terminal=terminal, width=200, color_system=None)
        steps = Steps(console)
        with steps.shown():
            for event in told:
                steps.listen("extract", event)
    return out.getvalue()


def test_no_event_is_markup_or_acts_on_the_terminal():
    text = f"[/red] [link=http://x]y[/link] :smile: {{}} %s %(x)s {ESCAPES}"
    told = [
        *events.parse_line(line(message=text), 1),
        *events.parse_line(line(kind="progress", step=text, unit=text, done=(1 << 63) - 1, total=1), 1),
        *events.parse_line(line(kind="progress", step="[/]", unit="[bold", done=1, total=(1 << 63) - 1), 1),
        *events.parse_line(b"[/red]" + ESCAPES.encode() + b"\n", 1),
    ]
    out = shown(*told)
    assert "[/red] [link=http://x]y[/link] :smile: {} %s %(x)s \\x1b[31m" in out
    # rich's own codes move the cursor; those of the event would set colours, titles, or clear
    for sent in ("\x1b[31m", "\x1b]0;", "\x07", "\x9b", "\u202e"):
        assert sent not in out


def test_a_step_can_not_fill_memory_with_its_log_nor_a_page_with_its_bars():
    from outliers.dispatch.run import StepOutput

    said = StepOutput("extract")
    kept = [shown for _ in range(400) for shown in said.accept(Event(1.0, "log", message="m" * 65_000))]
    assert sum(len(event.message) for event in kept) <= bounds.LOG_CHARS
    assert "nothing more of it is shown or kept" in kept[-1].message and len(said.lines) == len(kept)
    counted = [said.accept(Event(1.0, "progress", step=f"s{number}", total=2)) for number in range(1000)]
    assert sum(map(len, counted)) == bounds.STEPS
    assert said.accept(Event(1.0, "progress", step="s0", total=2))
    assert said.accept(Event(1.0, "heartbeat"))


MARKUP = [
    "[/red]", "[click](javascript:alert(1))", "<script>alert(1)</script>", "![x](http://127.0.0.1/y)", "a | b | c",
    "# heading", "- item", "1. item", "> quote", "```\ncode", "a\n\nb\n===", "*a* _b_ ~~c~~", "&lt;b&gt;", "\\", "`x`",
    "<http://x>", "[a]: http://x", "---", "\x1b[31m", "x`y``z", "$x$", "+ a", "a  \nb", "{}",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKUP)
def test_text_in_markdown_shows_itself_and_nothing_else(text):
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    plain = " ".join(visible(text).split())
    for made in (markdown(text), f"x {markdown(text)}"):
        assert _words(reader.render(made), "p") == " ".join(made.startswith("x ") * ["x"] + [plain])
    assert _words(reader.render(code(text)).replace("<code>", "").replace("</code>", ""), "p") == plain
    table = reader.render(f"| a | b |\n|--|--|\n| {markdown(text)} | kept |")
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert len(cells) == 2 and _words(cells[0], "") == plain and cells[1] == "kept"


def _words(rendered, tag):
    """The text of one element; fails where others are in it."""
    import html

    inner = re.fullmatch(f"<{tag}>(.*)</{tag}>\n?", rendered, re.DOTALL) if tag else re.fullmatch("(.*)", rendered)
    assert inner is not None and "<" not in inner[1], rendered
    return " ".join(html.unescape(inner[1]).split())


def test_a_step_of_any_name_has_an_artifact():
    from prefect.types.names import ArtifactKey
    from pydantic import TypeAdapter

    from tasks.progress import artifact_key

    for step in ("extract", f"[/red]{ESCAPES}", "", "ÄÖ ü", "x" * 500, "a/b\n"):
        TypeAdapter(ArtifactKey).validate_python(artifact_key(step, "0123456789abcdef"))
    assert artifact_key("extract", "01ab") == "extract-01ab"
