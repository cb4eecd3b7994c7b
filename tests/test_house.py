"""The house: imports run one way, the base needs no Prefect, the README's files are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "outliers": {"outliers"},
    "tasks": {"outliers", "tasks", "prefect"},
    "flows": {"outliers", "tasks", "flows", "prefect"},
}
WATCHED = {"outliers", "tasks", "flows", "prefect"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_run_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = set(imports(path)) & WATCHED - MAY_IMPORT[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_steps_run_where_prefect_is_not_installed():
    """Every module of outliers imports with Prefect, rich, s3fs and datasets made unimportable.

    `bucket` alone needs s3fs: the control side imports it for an s3:// target.
    """
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "outliers").rglob("*.py"))
        if path.name not in ("__main__.py", "bucket.py")
    ]
    script = (
        "import sys, importlib\n"
        "for name in ('prefect', 'rich', 's3fs', 'datasets'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print('all')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "all", done.stderr


def test_the_readme_names_every_folder_and_module():
    """The file map is the onboarding: what it names exists, and no module of the packages is missing from it."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\n(flows/.*?)```", text, re.DOTALL)
    assert block, "the README has no file map"
    named = set(re.findall(r"((?:flows|tasks|outliers)/[\w/]+\.(?:py|html))", block[1]))
    there = {
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".html") and path.name != "__init__.py"
    }
    assert named == there


def test_modules_begin_by_saying_what_they_are():
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_large_or_binary_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: an installed source archive has no list of files")
    for name in filter(None, listed.stdout.split("\0")):
        assert (ROOT / name).stat().st_size < 512_000, name
        assert Path(name).suffix not in {".safetensors", ".pt", ".bin", ".gguf", ".png", ".parquet", ".npy"}, name
