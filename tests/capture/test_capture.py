"""Capture: the right tensors, once a pass, on disk bit for bit, whatever kills the process in between."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import transformers
import zarr

from outliers.capture.extract import extract
from outliers.errors import SiteError
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.captured import prepared, stored
from tests.support.synthetic import Silent

SITES = ("attn_in", "mlp_in", "o_in", "resid")


def test_group_holds_ids_lengths_mask_and_described_axes(workspace, llama, text):
    study = prepared(workspace, llama, text, model={"dtype": "bfloat16"}, capture={"layers": (0, 2)})
    extract(study, workspace, Silent())
    group = zarr.open_group(workspace.capture(study.capture_id) / "activations.zarr", mode="r")
    assert group["token_ids"].shape == (4, 24)
    assert group["token_ids"].dtype == np.int32
    assert group["lengths"][:].tolist() == [24] * 4
    assert group["mask"][:].all()
    array = group["mlp_in"]
    assert (array.shape, array.chunks, array.dtype) == ((2, 4, 24, 32), (1, 1, 24, 32), np.uint16)
    assert array.metadata.dimension_names == ("layer", "sequence", "position", "feature")
    assert array.fill_value == 0x7FC0
    assert array.attrs["layers"] == [0, 2]
    fingerprint = json.loads((workspace.capture(study.capture_id) / "capture.json").read_text())
    assert len(fingerprint["sequence_texts"]) == 4


def test_one_forward_pass_a_batch_and_the_head_is_not_called(workspace, llama, text):
    calls = {"base": 0, "head": 0}

    def count(module, _args):
        calls["base"] += isinstance(module, transformers.LlamaModel)
        calls["head"] += isinstance(module, torch.nn.Linear) and module.out_features == tiny.COMMON["vocab_size"]

    study = prepared(workspace, llama, text, sequences=5, capture={"batch_sequences": 2})
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        extract(study, workspace, Silent())
    finally:
        hook.remove()
    assert calls == {"base": 3, "head": 0}


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_codec_changes_no_value_and_is_kept_on_resume(tmp_path, llama, text, codec):
    plain, other = open_workspace(tmp_path / "a"), open_workspace(tmp_path / "b")
    study = prepared(plain, llama, text)
    extract(study, plain, Silent())
    packed = prepared(other, llama, text, capture={"codec": codec})
    assert packed.capture_id == study.capture_id
    extract(packed, other, Silent())
    np.testing.assert_array_equal(stored(plain, study, "mlp_in"), stored(other, packed, "mlp_in"))
    # the same study again with the other codec finds the capture complete
    again = prepared(other, llama, text, capture={"codec": "none" if codec == "zstd" else "zstd"})
    assert extract(again, other, Silent())["sequences"] == 0


def test_finished_capture_is_not_computed_again(workspace, llama, text):
    study = prepared(workspace, llama, text)
    assert extract(study, workspace, Silent())["sequences"] == 4
    assert extract(study, workspace, Silent()) == {"sequences": 0, "of_sequences": 4, "seconds": 0.0}


def test_a_site_that_runs_twice_is_refused():
    """One tensor a site, layer and pass: anything else would silently be the wrong one."""
    from outliers.capture.forward import Batch, HookedPass
    from outliers.capture.staging import StagingBuffer
    from outliers.model.anatomy import SiteModule
    from outliers.study.layout import Layout

    class Twice(torch.nn.Module):
        def __init__(self, times):
            super().__init__()
            self.norm, self.times = torch.nn.Identity(), times

        def forward(self, input_ids, use_cache):
            for _ in range(self.times):
                self.norm(torch.zeros(1, 4, 8))
            return (input_ids,)

    layout = Layout(widths={"attn_in": 8}, layers=(0,), num_sequences=1, positions=4, dtype="float32", codec="none")
    module = SiteModule(site="attn_in", layer=0, path="norm", side="output")
    for times, message in ((2, "ran twice"), (0, "1 of 1 tensors never came, first: attn_in of layer 0")):
        with pytest.raises(SiteError, match=message), StagingBuffer(128, 4, lambda key, values: None) as ring:
            hooked = HookedPass(Twice(times), [module], ring, layout, lambda done: None)
            hooked.forward(Batch(range(1), (4,), 1, None, None), torch.zeros(1, 4, dtype=torch.long))


def test_environment_of_the_process_is_left_alone(workspace, llama, text):
    before = dict(os.environ)
    extract(prepared(workspace, llama, text), workspace, Silent())
    assert dict(os.environ) == before
