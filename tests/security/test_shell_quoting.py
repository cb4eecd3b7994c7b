"""Names with the characters of shells, of printf, of globs and of ssh: over a real sshd they arrive as they are.

Nothing of them runs: each would make a file called `ran` if a shell on either side read it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from outliers import errors
from outliers.jobs.jobs import JobSpec
from outliers.machines.base import MachineRequest
from outliers.machines.connection import Connection
from outliers.machines.deploy import deploy
from outliers.machines.destination import check_destination
from outliers.machines.probe import probe
from outliers.machines.ssh import Host, Hosts, SshProvider, access
from tests.support.one_host import box, machine, shared, workspace
from tests.support.remote import needs_sshd

__all__ = ["box", "machine", "shared", "workspace"]

NASTY = [
    "two words", "  ", "it's", 'say "x"', "$(touch ran)", "`touch ran`", "; touch ran", "| touch ran", "&& touch ran",
    "> ran", "< ran", "a\ntouch ran\n", "\ttab", "$HOME", "${IFS}", "~", "~root", "*", "?[a-z]", "{a,b}", "!!", "!touch",
    "# no comment", "\\", "\\n", "\\\\'", "%s", "%h", "%%", "-oProxyCommand=touch ran", "--help", "-", "=", "é ü 中 \U0001f600",
    "[/red]", "{}", "{0}", "@ROOT@", "@NAMES@", "'; touch ran; '", "\"; touch ran; \"", "'$(touch ran)'", "$'touch ran'",
    "EOF\n", "END_OF_LINES\ntouch ran", "() { :; }; touch ran", "a;b", "\x1b[31m", "\x7f", "x\\\ny",
]  # fmt: skip
FILES = [name for name in NASTY if name == name.strip() and "\x1b" not in name and "\x7f" not in name]
JOINED = ["".join(FILES[begin : begin + 12]) for begin in range(0, len(FILES), 12)]
FOLDERS = ["a b'$(touch ran)`touch ran`;touch ran", '"x" & touch ran # @NAMES@ é*{a,b}~!x', "-n \\n\\c %s $'touch ran'"]


@pytest.fixture(autouse=True)
def _nothing_runs(request, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    hosts = [request.getfixturevalue(name).folder for name in ("shared", "box") if name in request.fixturenames]
    yield
    for place in (tmp_path, *hosts):
        assert [path for path in place.rglob("*") if path.name == "ran"] == []


@needs_sshd
@pytest.mark.servers
def test_words_of_a_command_arrive_as_they_are(machine):
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    assert json.loads(machine.run([sys.executable, "-c", code, *NASTY], 30).stdout) == NASTY
    for word in NASTY[:8]:
        with pytest.raises(errors.JobFailed, match="can't be run on m1"):
            machine.run([f"/no/{word}"], 30)


@needs_sshd
@pytest.mark.servers
def test_the_words_and_environment_of_a_job_arrive_as_they_are(machine):
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['NASTY']]))"
    handle = machine.start(JobSpec("odd", (sys.executable, "-c", code, *NASTY), {"NASTY": "\n".join(NASTY)}))
    machine.result(handle)
    (said,) = [event.message for event in machine.follow(handle) if event.kind == "log"]
    assert json.loads(said) == [NASTY, "\n".join(NASTY)]


@needs_sshd
@pytest.mark.servers
def test_files_of_any_name_go_there_and_come_back(machine, tmp_path):
    """Of models and corpora: their files keep their names on the host."""
    for number, name in enumerate(JOINED):
        place = tmp_path / "out" / name / f"f{name}"
        place.parent.mkdir(parents=True)
        place.write_text(str(number))
    machine.upload(tmp_path / "out", "uploads/$(touch ran) x")
    machine.download("uploads/$(touch ran) x", tmp_path / "in")
    for number, name in enumerate(JOINED):
        assert (tmp_path / "in" / name / f"f{name}").read_text() == str(number)
    only = f"{JOINED[0]}/f{JOINED[0]}"
    machine.download("uploads/$(touch ran) x", tmp_path / "one", names=(only, "$(touch ran)", "not there"))
    assert [path.name for path in (tmp_path / "one").rglob("f*")] == [f"f{JOINED[0]}"]
    with pytest.raises(errors.BadInput, match="there is nothing at"):
        machine.download(f"no/{''.join(NASTY)}", tmp_path / "none")


@needs_sshd
@pytest.mark.servers
def test_holders_and_titles_are_text(machine):
    holder = "".join(NASTY)
    machine.ask("hold", holder=holder, title=holder, seconds_held=60)
    assert json.loads(Path(machine.workspace, "lease.json").read_text())["holders"][holder]["title"] == holder
    machine.ask("leave", holder=holder)
    assert holder not in json.loads(Path(machine.workspace, "lease.json").read_text())["holders"]


@needs_sshd
@pytest.mark.servers
def test_a_folder_and_a_python_of_any_name_are_looked_for_by_that_name(box):
    for word in (*JOINED, *FOLDERS):
        name = word.replace("\n", " ")
        found = probe(Connection("box"), name, name)
        assert found.root == f"{box.home}/{name}"
        assert found.pythons == ()
    # one name in the other: neither is read twice
    assert probe(Connection("box"), "x @NAMES@", "$(touch ran)").root == f"{box.home}/x @NAMES@"


@needs_sshd
@pytest.mark.servers
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_machine_lives_in_a_folder_of_any_name(box, workspace, folder):
    Hosts(workspace).add(Host("lab1", "box", folder=folder, python=sys.executable))
    source = SshProvider(workspace)
    machine = source.ensure(
        "m1", MachineRequest(host="lab1", gpu_filter="$(touch ran)", gpu_count=0), "run-1", "$(touch ran) [/red]"
    )
    assert machine.workspace == f"{box.home}/{folder}/machines/m1" and Path(machine.workspace).is_dir()
    handle = machine.start(JobSpec("says", ("echo", "here")))
    machine.result(handle)
    assert "here" in [event.message for event in machine.follow(handle)]
    assert "released" in source.release("m1")


@needs_sshd
@pytest.mark.servers
def test_an_environment_is_made_in_a_folder_of_any_name(box):
    """The installer's script: with a `uv` that makes what it is asked for and downloads nothing."""
    bin_folder = box.home / "bin $(touch ran)'"
    bin_folder.mkdir(parents=True)
    uv = bin_folder / "uv"
    uv.write_text(
        '#!/bin/sh\nfor last; do :; done\nprintf \'%s\\n\' "$@" >> "$HOME/asked"\n'
        f'[ "$1" = venv ] && mkdir -p "$last/bin" && ln -s "{sys.executable}" "$last/bin/python"\nexit 0\n'
    )
    uv.chmod(0o755)
    box.sessions(path=f"{bin_folder}:/usr/bin:/bin")
    for folder in FOLDERS[:3]:
        found = access(Host("lab1", "box", folder=folder)).probe()
        assert found.uv == str(uv)
        made = deploy(Connection("box"), found)
        assert made.how == "environment" and f"{box.home}/{folder}/deploy/venvs/" in made.python[3]
        assert Path(made.python[3]).exists()
    assert f"{box.home}/{FOLDERS[0]}/deploy" in (box.home / "asked").read_text()


REFUSED_HOSTS = [
    *(word for word in NASTY if word not in ("[/red]", "=")), "", " ", "me@box box", "a\nb", "box\n",
    "\nbox", "me@-oProxyCommand=touch", "ssh://-oX=y", "me@%h", "a%h", "box$(touch ran)", "\u202ebox", "x" * 600,
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED_HOSTS, ids=ascii)
def test_what_is_no_host_is_refused_in_words(text):
    with pytest.raises(errors.BadInput, match="is not a valid host name: ") as caught:
        Connection(text)
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)
    if text.startswith("-"):
        assert "begins with a dash would be an option of ssh" in str(caught.value)


@pytest.mark.parametrize("text", ["me@fe80::1%eth0", "fe80::1%eth0", "me@box", "a_b+c@box-1.x", "LAB\\me@box", "[::1]"])
def test_what_ssh_may_call_a_host_is_one(text):
    check_destination(text)


@pytest.mark.parametrize("option", ["--host", "--label", "--machine"])
@pytest.mark.parametrize("word", NASTY, ids=ascii)
def test_an_option_of_the_command_takes_no_such_name(capsys, option, word):
    from flows.cli.command import main

    try:
        code = main(["study", "--model", "m", f"{option}={word}", "--print-spec"])
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.strip() and "\x1b" not in err and "Traceback" not in err


@pytest.mark.parametrize("word", NASTY, ids=ascii)
def test_a_host_that_is_added_has_a_plain_name_and_a_visible_folder(tmp_path, word):
    hosts = Hosts(tmp_path)
    with pytest.raises(errors.BadInput, match="is not a valid name for a host"):
        hosts.add(Host(word, "box"))
    if not word.isprintable():
        for host in (Host("lab1", "box", folder=word), Host("lab1", "box", python=word)):
            with pytest.raises(errors.BadInput, match="control characters"):
                hosts.add(host)
    assert hosts.all() == ()
