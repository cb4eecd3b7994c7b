"""Machines that `study --keep-running` leaves: the end of the command says what they are, and how to end them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from flows.cli.command import _show_kept
from outliers.machines.rentals import KEPT, Rentals
from outliers.workspace import open_workspace
from tests.support import synthetic


@pytest.mark.parametrize("shards", [1, 3])
def test_the_summary_tells_of_every_machine_that_is_kept(tmp_path, shards):
    """A study that is spread has a machine for each part, named with its number."""
    acts = {site: np.zeros((2, 4, 5, 6), np.float32) for site in ("attn_in", "mlp_in")}
    prepared = synthetic.prepared_for(acts, "float32", compute={"shards": shards, "keep_running": True})
    names = [f"outliers-{prepared.capture_id}{end}" for end in ([""] if shards == 1 else ["-1of3", "-3of3"])]
    for name in [*names, "another"]:
        Rentals(tmp_path).begin(name, "sky", "a cloud", 1.0, f"run{KEPT}", "a study", 3600)
    console = Console(file=io.StringIO(), width=60)
    _show_kept(prepared, open_workspace(tmp_path), console)
    said = console.file.getvalue()
    assert [line.split()[1] for line in said.splitlines()] == names
    for name in names:
        assert f"{name} on a cloud is kept until " in said
        assert f"outliers machines release {name}\n" in said
