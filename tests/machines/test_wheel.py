"""This program as one wheel: what is in it, the hash that names it, and what it declares to need."""

from __future__ import annotations

import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import outliers
from outliers import version
from outliers.machines import wheel as wheels
from outliers.machines.wheel import build_wheel

UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_the_wheel_has_this_program_alone_and_is_small():
    wheel = build_wheel()
    # all of it is code and templates, 320 files: a second at 1 MB/s
    assert len(wheel.data) < 850_000
    assert len(wheel.key) == 16
    with zipfile.ZipFile(io.BytesIO(wheel.data)) as archive:
        names = archive.namelist()
        # no clock in it: the name is the content
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert {name.split("/")[0] for name in names} == {"outliers", f"outlier_features-{outliers.__version__}.dist-info"}
    root = Path(outliers.__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {name for name in names if ".dist-info/" not in name} == {
        f"outliers/{path.relative_to(root)}"
        for path in files
        if not path.name.startswith(".") and path.relative_to(root).parts[0] not in wheels.CONTROL
    }


def test_the_same_files_give_the_same_bytes_and_other_files_another_key(tmp_path, monkeypatch):
    copy = tmp_path / "outliers"
    shutil.copytree(Path(outliers.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    first = build_wheel()
    monkeypatch.setattr(version, "FOLDER", copy)
    os.utime(copy / "steps.py", (1, 1))
    (copy / "steps.py").chmod(0o600)
    (copy / "notes.txt").write_text("not ours")
    assert build_wheel() == first
    (copy / "steps.py").write_text((copy / "steps.py").read_text() + "\n")
    changed = build_wheel()
    assert changed.key != first.key
    assert changed.name == first.name == f"outlier_features-{outliers.__version__}-py3-none-any.whl"


@pytest.mark.servers
def test_it_installs_as_a_wheel_should(tmp_path):
    wheel = build_wheel()
    (tmp_path / wheel.name).write_bytes(wheel.data)
    target = tmp_path / "site"
    installer = [UV, "pip", "install", "--offline"] if UV else [sys.executable, "-m", "pip", "install", "--no-index"]
    subprocess.run(
        [*installer, "--quiet", "--no-deps", "--target", target, tmp_path / wheel.name], check=True, timeout=60
    )
    code = (
        "import outliers.machines.agent as a, importlib.metadata as m; print(a.__file__, m.version('outlier-features'))"
    )
    command = ["env", f"PYTHONPATH={target}", sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [str(target / "outliers/machines/agent.py"), outliers.__version__]
    # uv checks no sums: here each file is the one of its line
    rows = [line.split(",") for line in next(target.glob("*.dist-info/RECORD")).read_text().splitlines()]
    ours = {name: (digest, size) for name, digest, size in rows if name.startswith("outliers/")}
    assert ours["outliers/machines/agent.py"][1] == str((target / "outliers/machines/agent.py").stat().st_size)
    assert (
        ours["outliers/machines/agent.py"][0]
        == f"sha256={wheels._urlsafe((target / 'outliers/machines/agent.py').read_bytes())}"
    )


def test_what_it_needs_is_what_the_project_declares(tmp_path, monkeypatch):
    lines = wheels.requirements()
    assert {"torch", "numpy", "gguf", "zarr"} <= set(wheels.names())
    assert not {"prefect", "skypilot", "pytest", "s3fs", "distributed", "outlier-features"} & set(wheels.names())
    assert not [line for line in lines if ";" in line]
    locked = [line.partition(" --hash=")[0] for line in wheels.constraints()]
    assert f"psutil=={importlib.metadata.version('psutil')}" in locked
    # without a checkout: what is installed here, and what that needs in turn
    monkeypatch.setattr(version, "FOLDER", tmp_path / "outliers")
    found = {line.partition("==")[0]: line.partition("==")[2] for line in wheels.constraints()}
    assert set(wheels.names()) <= set(found)
    assert found["torch"] == importlib.metadata.version("torch").partition("+")[0]
    assert "anyio" in found  # of httpx
    assert "pytest" not in found


@pytest.mark.parametrize(
    ("ours", "name"), [("5.0", "constraints"), ("9.0", "constraints-latest"), ("7.1", "constraints")]
)
def test_a_host_gets_the_list_of_the_transformers_here(tmp_path, monkeypatch, ours, name):
    """Of neither list: the first."""
    for file, held in (("constraints", "5.0"), ("constraints-latest", "9.0")):
        (tmp_path / f"{file}.txt").write_text(f"# made\nnumpy=={held}\ntransformers=={held}\n")
        (tmp_path / f"{file.replace('constraints', 'hashes')}.txt").write_text(
            f"numpy=={held} \\\n    --hash=sha256:{held}\n"
        )
    monkeypatch.setattr(version, "FOLDER", tmp_path / "outliers")
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda of: ours if of == "transformers" else installed(of))
    held = "9.0" if name == "constraints-latest" else "5.0"
    assert wheels.constraints() == (f"numpy=={held} --hash=sha256:{held}", f"transformers=={held}")


def test_a_host_with_its_own_torch_is_sent_none_of_it():
    lines = ("numpy>=2", "torch>=2.6", "torchvision==1", "triton==3.0", "nvidia-cublas-cu12==12", "cuda-bindings==1")
    assert wheels.without_torch(lines) == ("numpy>=2", "torchvision==1")
