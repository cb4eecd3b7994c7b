"""What tests of captures share: a text, a tiny model, a study of them, and a finished capture read by zarr itself."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from tests.support import tiny


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The quick brown fox — jumps over the lazy dog, “twice”.\n" * 600)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("llama"), "Llama")


def prepared(workspace, folder, text, **parts):
    """The study of a tiny model and a text, with nothing left open."""
    return prepare(StudySpec.model_validate(tiny.spec_for(folder, text, **parts)), workspace)


def stored(workspace, study, site):
    """The site's array, all of it; bfloat16 as float32. A site that shares a tensor is read from the one that has it."""
    group = zarr.open_group(workspace.capture(study.capture_id) / "activations.zarr", mode="r")
    array = group[dict(group.attrs.get("alias_of", {})).get(site, site)]
    values = array[:]
    return (values.astype(np.uint32) << 16).view(np.float32) if array.attrs["dtype"] == "bfloat16" else values
