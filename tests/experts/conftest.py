"""Captures that several files read."""

from __future__ import annotations

import pytest

from outliers.workspace import open_workspace
from tests.support.captured import prepared
from tests.support.expert_captures import BATCH, model_of
from tests.support.expert_tables import make_capture


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Texts of other lengths: padding in every batch."""
    folder = tmp_path_factory.mktemp("documents")
    text = "Tokens go to experts; some more than others, and some to none.\n" * 4
    for number, length in enumerate((200, 5, 9, 32, 25, 61)):
        (folder / f"{number}.txt").write_text(text[number * 7 :][:length])
    return folder


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """Three layers of which the first is dense, four experts, two of them a token, and a shared one."""
    return model_of(tmp_path_factory.mktemp("deepseek"), "DeepseekV3")


@pytest.fixture
def study(tmp_path, deepseek, documents):
    workspace = open_workspace(tmp_path / "workspace")
    packed = {"packing": "documents", "bos": "never"}
    return workspace, prepared(workspace, deepseek, documents, sequences=6, length=32, capture=BATCH, corpus=packed)


@pytest.fixture(params=["float32", "bfloat16", "routing", "applied"])
def capture(request, tmp_path):
    """A capture on disk with a made-up routing, as `make_capture` gives it."""
    return make_capture(request.param, tmp_path)
