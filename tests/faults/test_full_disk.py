"""A capture on a disk that takes no more, or nothing at all: full, read-only, without rights.

Each ends in one clear error, and what was journaled is kept.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from outliers.capture.extract import extract
from outliers.errors import CaptureError
from outliers.store.chunks import Journal
from outliers.store.verify import verify
from outliers.workspace import open_workspace
from tests.capture.test_faults import assert_identical
from tests.support.captured import prepared
from tests.support.damaged import SITES, copy, whole
from tests.support.synthetic import Silent
from tests.support.zygote import Zygote

__all__ = ["copy", "whole"]  # fixtures, found by name


def in_namespace():
    """Whether this user may make a mount that only a test's own processes see."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return tried.returncode == 0


@pytest.mark.skipif(not in_namespace(), reason="a mount of one's own needs root")
@pytest.mark.parametrize("shares", [(0.02, 0.45), pytest.param((0.02, 0.2, 0.45, 0.8), marks=pytest.mark.studies)])
def test_a_disk_that_fills_at_any_point_costs_nothing_that_was_journaled(tmp_path, llama, text, shares):
    """A small tmpfs, which is gone with its processes. Filled up to here, then with room again; never a wrong byte."""
    calm = open_workspace(tmp_path / "calm")
    study = prepared(calm, llama, text, sequences=12, length=340, capture={"sites": SITES})
    extract(study, calm, Silent())
    size = sum(path.stat().st_size for path in calm.capture(study.capture_id).rglob("*") if path.is_file())
    disk, spec, log = tmp_path / "disk", tmp_path / "prepared.json", tmp_path / "log"
    disk.mkdir()
    spec.write_text(study.model_dump_json())
    mount = f'mount -t tmpfs -o size={2 * size} tmpfs {disk} && exec "$@"'
    with Zygote("unshare", "--mount", "sh", "-c", mount, "sh") as zygote:
        inside = Path(f"/proc/{zygote.process.pid}/root") / disk.relative_to("/")
        zygote.ready()
        shutil.copytree(calm.corpora, inside / "ws" / "corpora")
        done: list[int] = []
        for share in shares:
            free = shutil.disk_usage(inside).free
            held = sum(path.stat().st_size for path in (inside / "ws").rglob("*") if path.is_file())
            (inside / "ballast").write_bytes(bytes(max(0, int(free - (share * size - min(held, share * size))))))
            zygote.extract(spec, disk / "ws", log)
            assert zygote.wait() == 1
            assert "No space left on device" in log.read_text().rsplit("start\n", 1)[1]
            (inside / "ballast").unlink()
            folder = inside / "ws" / "captures" / study.capture_id
            if (folder / "capture.json").exists():
                assert verify(folder, Silent()).sound
                done.append(verify(folder, Silent()).done)
        assert done == sorted(done)
        assert 0 < done[-1] < 12, "the disk filled too early or too late to show anything"
        zygote.extract(spec, disk / "ws", log)
        assert zygote.wait() == 0, log.read_text()
        assert_identical(calm, open_workspace(inside / "ws"), study)


@pytest.mark.skipif(not in_namespace(), reason="a mount of one's own needs root")
def test_a_read_only_workspace_is_one_clear_error(copy, tmp_path):
    workspace, study, folder = copy
    Journal.open(folder / "journal.jsonl").redo([0])
    spec = tmp_path / "prepared.json"
    spec.write_text(study.model_dump_json())
    where = f'mount --bind -o ro {workspace.root} {workspace.root} && exec "$@"'
    command = [sys.executable, "-m", "outliers", "extract", str(spec), "--workspace", str(workspace.root)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", where, "sh", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert extract(study, workspace, Silent())["sequences"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_one_clear_error(copy):
    workspace, study, folder = copy
    Journal.open(folder / "journal.jsonl").redo([0])
    site = folder / "activations.zarr" / "mlp_in"
    site.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(CaptureError, match="can't be written"):
            extract(study, workspace, Silent())
    finally:
        site.chmod(stat.S_IRWXU)
