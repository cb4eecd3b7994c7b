"""How the loops of this folder are compiled and cached: as those that count, under a name of their own files."""

from __future__ import annotations

from pathlib import Path

from outliers.compiling import compiler

FILES = sorted(Path(__file__).parent.glob("*.py"))
"""The sources of the loops."""
compiled = compiler(FILES)
