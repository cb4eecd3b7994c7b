"""A host that was taken over: whatever it answers, this side ends with an error that names it, and obeys nothing of it.

The host is a real sshd whose login shell answers every command with what a test has put there.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from outliers import bounds, errors, events, jobs
from outliers.events import Event
from outliers.jobs import JobHandle, JobSpec
from outliers.machines.answers import parse_result
from outliers.machines.archive import Limits, unpack
from outliers.machines.connection import CONFIG_VARIABLE, Connection
from outliers.machines.deploy import Deployment
from outliers.machines.probe import probe
from outliers.machines.remote import PATIENCE_VARIABLE, RemoteMachine
from outliers.visible import code, markdown, visible
from tests.remote import Sshd, needs_sshd

ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\u202egnp.exe\x7f\r"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000

# Events

GOOD = {"t": 1.5, "kind": "log", "level": "info", "message": "fine"}


def line(**changes):
    return json.dumps(GOOD | changes).encode() + b"\n"


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


# Archives


def member(name="folder/a.txt", kind=tarfile.REGTYPE, data=b"data", link="", pax=None):
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.pax_headers = kind, link, pax or {}
    found.size = len(data) if kind == tarfile.REGTYPE else 0
    return found, data


def archive(*members, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for found, data in members:
            file.addfile(found, io.BytesIO(data))
    return buffer.getvalue()


def patched(data, begin, value):
    """An archive whose first header is changed, with a right checksum."""
    changed = bytearray(data)
    changed[begin : begin + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


def sparse(folder, version):
    """A sparse file of 3 MB in a few KB, as GNU tar writes it."""
    with (folder / "big").open("wb") as file:
        file.truncate(3_000_000)
        file.seek(1_000_000)
        file.write(b"x")
    form = ["--format=pax", f"--sparse-version={version}"] if version else ["--format=gnu"]
    command = ["tar", "-C", folder, "-S", *form, "--transform=s,big,folder/big,", "-cf", folder / "a.tar", "big"]
    subprocess.run(command, check=True)
    data = (folder / "a.tar").read_bytes()
    assert len(data) < 50_000
    (folder / "big").unlink()
    (folder / "a.tar").unlink()
    return data


ARCHIVES = {
    "symbolic link": archive(member(kind=tarfile.SYMTYPE, link="/etc/passwd")),
    "hard link": archive(member("folder/a"), member("folder/b", kind=tarfile.LNKTYPE, link="folder/a")),
    "FIFO": archive(member(kind=tarfile.FIFOTYPE)),
    "device": archive(member(kind=tarfile.CHRTYPE)),
    "block device": archive(member(kind=tarfile.BLKTYPE)),
    "folder": archive(member(kind=tarfile.DIRTYPE)),
    "contiguous": archive(member(kind=tarfile.CONTTYPE)),
    "upwards": archive(member("folder/../../evil")),
    "full path": archive(member("/tmp/evil")),
    "full path below": archive(member("folder//tmp/evil")),
    "of no kind of ours": archive(member("evil")),
    "a point": archive(member("folder/./evil")),
    "pax path upwards": archive(member(pax={"path": "folder/../evil"})),
    "pax link": archive(member(pax={"linkpath": "/etc/passwd"})),
    "pax size": archive(member(pax={"size": "99999999999"})),
    "pax GNU name": archive(member(pax={"GNU.sparse.name": "folder/evil"})),
    "pax global": archive(member(kind=tarfile.XGLTYPE)),
    "pax long": archive(member(pax={"comment": "c" * 100_000})),
    "GNU long name": archive(member("folder/" + "n" * 200), form=tarfile.GNU_FORMAT),
    "twice": archive(member(), member()),
    "below a file": archive(member("folder/a"), member("folder/a/b")),
    "over a folder": archive(member("folder/a/b"), member("folder/a")),
    "file and folder": archive(member("file"), member("folder/a")),
    "deep": archive(member("folder/" + "d/" * 40 + "x")),
    "long name": archive(member("folder/" + "n" * 300)),
    "escapes in a name": archive(member("folder/\x1b[31mred")),
    "name not UTF-8": patched(archive(member(form_name := "folder/ab")), len(form_name) - 1, b"\xff"),
    "many": archive(*(member(f"folder/{number}") for number in range(12))),
    "large": archive(member(data=b"x" * 300_000)),
    "large in all": archive(*(member(f"folder/{number}", data=b"x" * 30_000) for number in range(9))),
    "size of 2^70": patched(archive(member()), 124, b"\x80\0\0\x40" + b"\0" * 8),
    "size negative": patched(archive(member()), 124, b"\xff" * 12),
    "size more than comes": patched(archive(member()), 124, b"00000100000\0"),
    "torn": archive(member(data=b"x" * 5000))[:3000],
    "no archive": b"<html>" * 1000,
    "gzip": b"\x1f\x8b" + bytes(2000),
    "empty": b"",
    "checksum": archive(member())[:148] + b"0000000\0" + archive(member())[156:],
}


@pytest.mark.parametrize("data", ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_is_not_plain_is_refused_and_nothing_of_it_stays(tmp_path, data):
    limits = Limits(max_bytes=200_000, max_files=10)
    _refused(tmp_path, data, limits)


@pytest.mark.parametrize("version", ["", "0.0", "0.1", "1.0"])
def test_a_sparse_file_is_refused(tmp_path, version):
    _refused(tmp_path, sparse(tmp_path, version), Limits(max_bytes=200_000))


def test_files_that_were_not_asked_for_are_refused(tmp_path):
    _refused(tmp_path, archive(member(), member("folder/evil")), Limits(names={"a.txt"}))


def _refused(folder, data, limits):
    home = folder / "home"
    (home / "results").mkdir(parents=True)
    (home / "results" / "a.txt").write_text("before")
    began = {str(path): path.lstat().st_ino for path in folder.rglob("*")}
    with pytest.raises(
        errors.JobFailed, match=r"results of box can't be brought home: .*Nothing of it was kept"
    ) as caught:
        unpack(io.BytesIO(data), home / "results", limits, "results of box")
    assert not ACTS.search(str(caught.value)) and len(str(caught.value)) < 1000
    assert {str(path): path.lstat().st_ino for path in folder.rglob("*")} == began
    assert (home / "results" / "a.txt").read_text() == "before"
    assert not Path("/tmp/evil").exists()


def test_plain_files_come(tmp_path):
    names = ["folder/a.txt", "folder/deep/" + "n" * 150, "folder/ünï", "folder/empty"]
    data = archive(*(member(name, data=name.encode() * 300 if name != "folder/empty" else b"") for name in names))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kept").write_text("kept")
    unpack(io.BytesIO(data), tmp_path / "in", Limits(), "results")
    for name in names[:3]:
        assert (tmp_path / "in" / name.removeprefix("folder/")).read_bytes() == name.encode() * 300
    assert (tmp_path / "in" / "empty").read_bytes() == b"" and (tmp_path / "in" / "kept").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# What is shown


def shown(*told: Event) -> str:
    from flows.console import Steps

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
    from tasks.watch import Said

    said = Said("extract")
    kept = [shown for _ in range(400) for shown in said.taken(Event(1.0, "log", message="m" * 65_000))]
    assert sum(len(event.message) for event in kept) <= bounds.LOG_CHARS
    assert "nothing more of it is shown or kept" in kept[-1].message and len(said.lines) == len(kept)
    counted = [said.taken(Event(1.0, "progress", step=f"s{number}", total=2)) for number in range(1000)]
    assert sum(map(len, counted)) == bounds.STEPS
    assert said.taken(Event(1.0, "progress", step="s0", total=2))
    assert said.taken(Event(1.0, "heartbeat"))


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


# Over ssh


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    shell = folder / "shell"
    shell.write_text('#!/bin/sh\n. "$HOME/do"\n')
    shell.chmod(0o755)
    with Sshd(folder / "box", shell=str(shell)) as box, pytest.MonkeyPatch.context() as patch:
        patch.setenv(CONFIG_VARIABLE, str(box.config))
        patch.setenv(PATIENCE_VARIABLE, "1")
        yield box


@pytest.fixture
def does(hostile):
    """Say what the host does with every command: print these bytes, or run this script."""

    def act(data: bytes = b"", script: str = "", code: int = 0) -> None:
        (hostile.home / "data").write_bytes(data)
        (hostile.home / "do").write_text(script or f'cat "$HOME/data"\nexit {code}\n')

    return act


@pytest.fixture
def machine(hostile):
    return RemoteMachine(
        name="m1", provider="ssh", connection=Connection("box"), root="/r", workspace="/r/machines/m1",
        deployment=Deployment(("python3",), "0" * 16, 0.0, "ready"), price_per_hour=0.0, instance_id="",
        lease_left=lambda: 60.0,
    )  # fmt: skip


FACTS = {
    "cpus": 4, "ram_bytes": 10**10, "ram_available_bytes": 10**9, "disk_free_bytes": 10**12, "python": "3.12.1",
    "gpus": [{"name": "NVIDIA A100", "total_bytes": 85 * 10**9, "reported": [8, 0]}],
}  # fmt: skip
ANSWER = {"facts": FACTS, "instance_id": "0" * 32}
HANDLE = JobHandle("extract-1", 1, Path("/r/machines/m1/jobs/extract-1/0001"))


def told(**changes):
    return json.dumps(ANSWER | {"facts": FACTS | changes}).encode()


HOSTILE_FACTS = {
    "nothing": b"",
    "text": b"Welcome!\n" + ESCAPES.encode(),
    "nested": DEEP.encode(),
    "not UTF-8": b'{"facts": "\xff"}',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "no facts": b"{}",
    "facts a list": b'{"facts": [], "instance_id": ""}',
    "cpus 0": told(cpus=0),
    "cpus a list": told(cpus=[1]),
    "memory negative": told(ram_bytes=-5),
    "memory 2^70": told(ram_bytes=1 << 70),
    "memory of 5,000 digits": told(ram_bytes=0).replace(b'"ram_bytes": 0', b'"ram_bytes": ' + LONG.encode()),
    "disk NaN": told(disk_free_bytes=float("nan")),
    "disk infinite": told(disk_free_bytes=float("inf")),
    "disk 1e999": told(disk_free_bytes=0).replace(b'"disk_free_bytes": 0', b'"disk_free_bytes": 1e999'),
    "disk a string": told(disk_free_bytes="much"),
    "GPUs an object": told(gpus={"name": "x"}),
    "GPUs many": told(gpus=FACTS["gpus"] * 5000),
    "GPU without a name": told(gpus=[{"total_bytes": 1}]),
    "GPU with a long name": told(gpus=[{"name": "x" * 100_000, "total_bytes": 1}]),
    "GPU of odd capability": told(gpus=[{"name": "x", "total_bytes": 1, "reported": [1]}]),
    "error a list": b'{"error": [1]}',
    "error without words": b'{"error": {}}',
    "error of lists": b'{"error": {"kind": [], "message": {}}}',
    "instance a path": json.dumps(ANSWER | {"instance_id": "../../x"}).encode(),
}


@needs_sshd
@pytest.mark.servers
@pytest.mark.parametrize("data", HOSTILE_FACTS.values(), ids=HOSTILE_FACTS)
def test_an_answer_that_is_none_is_an_error_that_names_the_host(machine, does, data):
    does(data)
    with pytest.raises(errors.OutliersError, match="box") as caught:
        machine.facts()
    assert not ACTS.search(str(caught.value)) and len(str(caught.value)) < 3000


@needs_sshd
@pytest.mark.servers
def test_names_in_answers_and_errors_are_visible(machine, does):
    does(told(gpus=[{"name": f"A100{ESCAPES}", "total_bytes": 1}], python=ESCAPES))
    facts = machine.facts()
    assert (facts.gpus[0].name, facts.cpus) == (f"A100{visible(ESCAPES)}", 4)
    assert not ACTS.search(facts.python)
    does(json.dumps({"error": {"kind": "BadInput", "message": f"[/red]{ESCAPES}"}}).encode())
    with pytest.raises(errors.BadInput, match=re.escape("[/red]\\x1b[31m")):
        machine.facts()
    does(script=f"printf '{ESCAPES}' >&2; exit 3")
    done = machine.connection.call("true")
    assert done.returncode == 3 and not ACTS.search(done.stderr) and not ACTS.search(done.text())


@needs_sshd
@pytest.mark.servers
def test_each_question_takes_its_own_answer_alone(machine, does):
    does(b'{"status": "sleeping"}')
    with pytest.raises(errors.JobFailed, match="box answers 'status' with what is no answer to it"):
        machine.status(HANDLE)
    does(b'{"name": "extract-1", "attempt": 1, "folder": "/etc"}')
    with pytest.raises(errors.JobFailed, match="box started 'extract-1' in /etc"):
        machine.start(JobSpec("extract-1", ("true",)))
    does(b'{"name": "other", "attempt": 1, "folder": "/r/machines/m1/jobs/other/0001"}')
    with pytest.raises(errors.JobFailed, match="box started 'other'"):
        machine.start(JobSpec("extract-1", ("true",)))
    does(b'{"left": 1e999, "holders": {}}')
    with pytest.raises(errors.JobFailed, match="box"):
        machine.ask("hold", holder="a", title="b", seconds_held=1)
    does(json.dumps({"removed": {ESCAPES: 1}}).encode())
    assert not ACTS.search(str(machine.ask("remove_captures", names=["x"])))


@needs_sshd
@pytest.mark.servers
@pytest.mark.parametrize("stream", [1, 2])
def test_an_answer_without_end_is_cut_off(machine, does, stream):
    does(script=f"yes xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >&{stream}")
    began = time.monotonic()
    with pytest.raises(errors.JobFailed, match="box answered with more than 8,388,608 bytes, and was cut off"):
        machine.facts()
    assert time.monotonic() - began < 30
    does(told())
    assert machine.facts().cpus == 4


@needs_sshd
@pytest.mark.servers
def test_an_archive_without_end_is_cut_off_and_nothing_stays(machine, does, tmp_path):
    head = archive(member(data=b"x" * 100))[:512]
    does(head, script='cat "$HOME/data"; yes')
    with pytest.raises(errors.JobFailed, match="box answered with more than"):
        machine.download("results/x", tmp_path / "in", max_bytes=100_000, max_files=3)
    does(archive(*(member(f"folder/{number}") for number in range(4))))
    with pytest.raises(errors.JobFailed, match=r"results/x on m1 .*more than 3 files"):
        machine.download("results/x", tmp_path / "in", max_bytes=100_000, max_files=3)
    does(archive(member(), member("folder/evil")))
    with pytest.raises(errors.JobFailed, match="'evil' came, which was not asked for"):
        machine.download("results/x", tmp_path / "in", names=("a.txt", "b.txt"))
    assert list(tmp_path.iterdir()) == []
    does(archive(member()))
    machine.download("results/x", tmp_path / "in", max_bytes=100_000, max_files=3, names=("a.txt",))
    assert (tmp_path / "in" / "a.txt").read_bytes() == b"data"


@needs_sshd
@pytest.mark.servers
def test_lines_without_end_are_not_held_and_the_stream_goes_on(machine, does):
    ended = b'{"kind": "ended", "status": "done"}\n'
    does(line() + b"y" * (4 * bounds.LINE_BYTES) + b"\n" + line(message="after") + b"\x1b[2J\n" + ended)
    found = list(machine.follow(HANDLE))
    assert [event.message[:20] for event in found] == ["fine", "unreadable event: yy", "after", "unreadable event: \\x"]
    assert all(len(event.message) < 2000 and not ACTS.search(event.message) for event in found)
    assert found[2].end == 2 * len(line()) + len("after") - len("fine") + 4 * bounds.LINE_BYTES + 1


@needs_sshd
@pytest.mark.servers
def test_bytes_that_never_end_a_line_count_as_silence(machine, does):
    does(script="while :; do printf x; sleep 0.05; done")
    began = time.monotonic()
    with pytest.raises(errors.MachineLost, match="box has said nothing for 1 s"):
        list(machine.connection.lines("follow", 1.0))
    assert time.monotonic() - began < 10


PROBE = {
    "system": "Linux x86_64", "cpus": "4", "ram_kb": "16000000", "available_kb": "8000000", "root": "/home/a/.outliers",
    "writable": "yes", "disk_kb": "100000000", "visible": "all", "python": "3.12.1|/usr/bin/python3||True",
}  # fmt: skip


def probed(**changes):
    found = {name: value for name, value in (PROBE | changes).items() if value is not None}
    return ("\nbegin\n" + "".join(f"{name}={value}\n" for name, value in found.items()) + "end\n").encode()


HOSTILE_PROBES = {
    **{
        f"no {name}": probed(**{name: None}) for name in ("system", "cpus", "ram_kb", "available_kb", "root", "visible")
    },
    **{f"{name} a word": probed(**{name: "many"}) for name in ("cpus", "ram_kb", "available_kb", "disk_kb")},
    **{f"{name} of 5,000 digits": probed(**{name: LONG}) for name in ("cpus", "ram_kb", "disk_kb", "limit")},
    "memory negative": probed(ram_kb="-5"),
    "memory in another script": probed(ram_kb="१२"),
    "root relative": probed(root="etc"),
    "root with escapes": probed(root=f"/a{ESCAPES}"),
    "root long": probed(root="/" + "r" * 10_000),
    "another system": probed(system=f"Plan9{ESCAPES}"),
    "nothing": b"",
    "text": ESCAPES.encode(),
}


@needs_sshd
@pytest.mark.servers
@pytest.mark.parametrize("data", HOSTILE_PROBES.values(), ids=HOSTILE_PROBES)
def test_a_probe_that_can_not_be_is_an_error_that_names_the_host(hostile, does, data):
    does(data)
    with pytest.raises((errors.DeployFailed, errors.HostRefused), match="box") as caught:
        probe(Connection("box"), ".outliers")
    assert not ACTS.search(str(caught.value)) and len(str(caught.value)) < 3000


@needs_sshd
@pytest.mark.servers
def test_names_in_a_probe_are_visible(hostile, does):
    gpu = f"GPU-1, A100{ESCAPES.strip()}, 81920, 8.0"
    does(probed(gpu=gpu, python=f"3.12.1|/usr/bin/python3|{ESCAPES}|True"))
    found = probe(Connection("box"), ".outliers")
    assert found.facts.gpus[0].name == f"A100{visible(ESCAPES.strip())}"
    assert found.pythons == ()  # it says of its torch what no version is
    does(probed())
    assert probe(Connection("box"), ".outliers").pythons[0].path == "/usr/bin/python3"
