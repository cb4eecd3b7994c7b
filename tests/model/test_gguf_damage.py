"""The folder that is made of a GGUF file: a flipped bit in it is never computed with."""

from __future__ import annotations

import shutil

import pytest

from outliers.files.atomic import sha256_file
from outliers.model.gguf import WEIGHTS, gguf_weights
from outliers.model.source import find_model
from outliers.spec import ModelSpec
from outliers.workspace import open_workspace
from tests.support.damaged import flip
from tests.support.smollm2 import smollm2_workspace

__all__ = ["smollm2_workspace"]  # a fixture, found by name


@pytest.mark.long
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "LISTING"])
def test_a_converted_model_with_a_flipped_bit_is_converted_again(smollm2_workspace, tmp_path, name):
    source = find_model(ModelSpec(id="builtin:smollm2"), smollm2_workspace)
    whole = gguf_weights(source, smollm2_workspace)
    shutil.copytree(smollm2_workspace.models, tmp_path / "models")
    workspace = open_workspace(tmp_path)
    folder = workspace.models / whole.relative_to(smollm2_workspace.models)
    path = next(folder.glob(f"{WEIGHTS}.*")) if name == "LISTING" else folder / name
    flip(path, path.stat().st_size // 2)
    assert gguf_weights(source, workspace) == folder
    for other in whole.iterdir():
        assert sha256_file(folder / other.name) == sha256_file(other), other.name
