"""What a host is given: held to versions and to the hashes of their files, so that an index can't serve another content."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from outliers.machines.wheel import LISTS, constraints, requirements, without_torch

ROOT = Path(__file__).resolve().parent.parent.parent
UV = Path(sys.executable).with_name("uv")


def test_every_package_of_a_host_but_torch_has_hashes():
    held = {line.partition("==")[0]: line for line in constraints()}
    hashed = {name for name, line in held.items() if re.search(r" --hash=sha256:[0-9a-f]{64}( |$)", line)}
    names = {re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0].lower() for line in without_torch(requirements())}
    assert len(names) >= 18
    assert names <= hashed
    assert len(hashed) >= 50  # what these need in turn
    assert not hashed & {"torch", "triton"}


@pytest.mark.parametrize(("listed", "hashes"), sorted(LISTS.items()))
def test_the_hashes_are_of_the_versions_of_the_constraints(listed, hashes):
    """`make constraints` writes both: one alone would leave packages of a host without."""
    pinned = {line.strip() for line in (ROOT / listed).read_text().splitlines() if line[:1] not in "#\n"}
    of = [line.split()[0] for line in (ROOT / hashes).read_text().splitlines() if re.match(r"[\w.-]+==", line)]
    assert len(set(of) & pinned) >= 50
    other = [one for one in of if one not in pinned]
    # those of other systems are in no list that was resolved for this one
    assert not {one.partition("==")[0] for one in other} & {one.partition("==")[0] for one in pinned}


def test_the_two_lists_differ_where_skypilot_holds_back_and_nowhere_else():
    """A list that was made on another day has versions that nothing explains (constraints.in)."""
    with_it, newest = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line) for name in LISTS
    )
    assert set(newest) - set(with_it) <= {"httpcore2", "httpx2", "truststore"}  # of huggingface-hub 2
    assert "skypilot" in set(with_it) - set(newest)
    older = {name for name in set(with_it) & set(newest) if with_it[name] != newest[name]}
    assert all(Version(with_it[name]) < Version(newest[name]) for name in older)
    text = (ROOT / "constraints.in").read_text()
    assert [name for name in sorted(older) if not re.search(rf"\b{name}\b", text)] == []


def wheel(folder, body):
    """A wheel `outliers-canary` 1.0 with that module."""
    folder.mkdir()
    path = folder / "outliers_canary-1.0-py3-none-any.whl"
    info = "outliers_canary-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("outliers_canary.py", body)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: outliers-canary\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.skipif(not UV.exists(), reason="uv is not in this environment: make installs it")
def test_another_content_of_the_same_version_is_not_installed(tmp_path):
    """As `deploy` runs it: uv, constraints with hashes, requirements without."""
    wanted = wheel(tmp_path / "true", "ours = True\n")
    wheel(tmp_path / "false", "ours = False\n")
    (tmp_path / "requirements.txt").write_text("outliers-canary\n")
    (tmp_path / "constraints.txt").write_text(f"outliers-canary==1.0 --hash=sha256:{wanted}\n")
    for served, code in (("true", 0), ("false", 1)):
        place = tmp_path / f"into-{served}"
        held = ["-c", tmp_path / "constraints.txt", "-r", tmp_path / "requirements.txt", "--python", sys.executable]
        done = subprocess.run(
            [
                UV,
                "pip",
                "install",
                "--no-index",
                "--no-cache",
                "--find-links",
                tmp_path / served,
                "--target",
                place,
                *held,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert (place / "outliers_canary.py").exists() == (code == 0)
        assert code == 0 or "hash" in done.stderr.lower()
        shutil.rmtree(place, ignore_errors=True)
