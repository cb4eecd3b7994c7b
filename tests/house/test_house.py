"""The house: imports run one way, the base needs no Prefect, the README's files are there."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from outliers.machines.wheel import CONTROL

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("flows", "outliers", "tasks")


TRITON = ("triton_kernels.py", "triton_ops.py")


def test_steps_run_where_prefect_is_not_installed():
    """Every module of outliers imports with Prefect, rich, s3fs, aiobotocore and datasets made unimportable.

    `bucket` alone needs aiobotocore: the control side imports it for an s3:// target. The kernels of a GPU need Triton, which
    torch's CUDA builds bring along.
    """
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "outliers").rglob("*.py"))
        if path.name not in ("__main__.py", "bucket.py", *([] if importlib.util.find_spec("triton") else TRITON))
    ]
    script = (
        "import sys, importlib\n"
        "for name in ('prefect', 'rich', 's3fs', 'aiobotocore', 'datasets'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print('all')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "all", done.stderr


def test_the_readme_names_every_package():
    """The map is the onboarding: what it names exists, and no package is missing from it."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\n(flows/ .*?)```", text, re.DOTALL)
    assert block and len(block[1].splitlines()) < 40
    named = {line.split()[0] for line in block[1].splitlines()}
    assert all((ROOT / name).exists() for name in named)
    packages = {
        f"{path.parent.relative_to(ROOT)}/" for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")
    }
    inner = {name for name in packages if name.count("/") > 2}  # a package's own: its line, or its docstring, says it
    assert packages - inner - {"outliers/"} <= named


def test_the_contracts_of_imports_name_every_package():
    """`exhaustive` sees modules below outliers alone; nothing is excused from a contract."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert set(config["root_packages"]) == set(PACKAGES)
    rooms = next(
        contract for contract in config["contracts"] if contract["type"] == "layers" and "containers" in contract
    )
    assert rooms["exhaustive"] and "exhaustive_ignores" not in rooms
    assert not any("ignore_imports" in contract for contract in config["contracts"])
    (machine,) = [contract for contract in config["contracts"] if "CONTROL" in contract["name"]]
    assert machine["forbidden_modules"] == [f"outliers.{name}" for name in CONTROL]


def test_modules_begin_by_saying_what_they_are():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_large_or_binary_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: an installed source archive has no list of files")
    for name in filter(None, listed.stdout.split("\0")):
        assert (ROOT / name).stat().st_size < 512_000, name
        assert Path(name).suffix not in {".safetensors", ".pt", ".bin", ".gguf", ".png", ".parquet", ".npy"}, name


def test_the_list_of_slow_tests_names_tests_that_are_there():
    """A test that was renamed would be fast again, unseen."""
    for name in (ROOT / "tests" / "support" / "slow.txt").read_text().split():
        path, *_, function = name.split("::")
        assert f"def {function}(" in (ROOT / path).read_text(), f"{name}: measure again with `make test-times`"
