"""Known answers: SmolLM2 in float32 on a little text, its effects against whole logits, hooks and formats of this file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.probe.run import probe
from outliers.publish.contents import check_probes
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.study.probes import probe_folder
from tests.support.synthetic import Silent

pytestmark = pytest.mark.studies

PARTS = {"attn_in": "self_attn", "mlp_in": "mlp", "o_in": "self_attn.o_proj", "down_in": "mlp.down_proj"}
SUPER = "11.mlp.down_proj[507,1229]"


def int8_token(x):
    """A scale a token: absmax / 127.5, codes -128 to 127."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127.5), np.float32(2.0**-23))
    return np.clip(np.rint(x / scale), -128, 127).astype(np.float32) * scale


def e4m3(x):
    """Positive float32 values rounded to E4M3, ties to even."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(x, 2.0**-20))), -6)
    step = np.exp2(exponent - 3)
    return np.minimum(np.rint(x / step) * step, 448).astype(np.float32)


def nvfp4(x, amax):
    """Groups of 16 with a scale in E4M3 under one global scale; E2M1 by its table of magnitudes."""
    # rounded twice, as the library has it
    whole = np.float32(1) / np.float32(amax) * np.float32(448 * 6)
    groups = x.reshape(*x.shape[:-1], -1, 16)
    scale = e4m3(np.abs(groups).max(-1, keepdims=True) / np.float32(6) * whole)
    scale = np.where(scale == 0, np.float32(0.125), scale) / whole
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    middles = (table[1:] + table[:-1]) / 2
    size = np.abs(groups / scale)
    # a value in the middle goes to the entry of the even code
    lower = np.searchsorted(middles, size, side="left")
    upper = np.searchsorted(middles, size, side="right")
    code = np.where(lower == upper, lower, np.where(lower % 2 == 0, lower, upper))
    return (np.copysign(table[code], groups) * scale).astype(np.float32).reshape(x.shape)


class Whole:
    """The whole model, one sequence after the other."""

    def __init__(self, study, workspace):
        self.model = load_model(study.model, workspace, "cpu", head=True)
        self.ids = torch.from_numpy(load_corpus(study.corpus, workspace).token_ids.astype(np.int64))

    def logits(self, changes=None):
        handles = []
        for layer, block in enumerate(self.model.model.layers):
            for site, change in (changes or {}).items():
                part = block.get_submodule(PARTS[site])
                handles.append(part.register_forward_pre_hook(self._hook(change, layer), with_kwargs=True))
        try:
            with torch.inference_mode():
                parts = [self.model(row[None]).logits for row in self.ids]
            return torch.cat(parts)[:, :-1].double()
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(change, layer):
        def before(_module, args, kwargs):
            if args:
                return (change(args[0], layer), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"], layer)}

        return before


def zero(feature):
    def change(x, _layer):
        made = x.clone()
        made[..., feature] = 0
        return made

    return dict.fromkeys(("attn_in", "mlp_in"), change)


@pytest.fixture(scope="module")
def answers(smollm2_workspace):
    """What the probe gives: sixty-four tokens of two sequences, in float32."""
    spec = {
        "model": {"id": "builtin:smollm2", "dtype": "float32"},
        "corpus": {"source": "builtin:python-docs", "num_sequences": 2, "sequence_length": 64},
        "capture": {"sites": tuple(PARTS), "perplexity": True},
        "criteria": {"site": "block"},
        "probe": {"zero": ("247", "507"), "quantize": ("int8_token", "nvfp4"), "weight": ("auto",)},
    }
    study = prepare(StudySpec.model_validate(spec), smollm2_workspace)
    extract(study, smollm2_workspace, Silent())
    probe(study, smollm2_workspace, Silent())
    data = (probe_folder(study, smollm2_workspace) / "numbers" / "probes.json").read_bytes()
    return study, check_probes(data), Whole(study, smollm2_workspace)


def test_the_known_answers_are_those_of_whole_logits(answers):
    _, found, whole = answers
    by_name = {change.name: change for change in found.changes}
    largest = {}

    def look(site):
        def change(x, layer):
            largest[site, layer] = max(largest.get((site, layer), 0.0), float(x.abs().max()))
            return x

        return change

    untouched = whole.logits({site: look(site) for site in PARTS})
    p = torch.log_softmax(untouched, -1)

    def tried(name):
        if name.startswith("zero"):
            return zero(int(name.split()[1]))
        if name == "int8_token":
            return dict.fromkeys(PARTS, lambda x, _layer: torch.from_numpy(int8_token(x.numpy())))

        def at(site):
            return lambda x, layer: torch.from_numpy(nvfp4(x.numpy(), largest[site, layer]))

        return {site: at(site) for site in PARTS}

    for name in ("zero 247", "zero 507", "int8_token", "nvfp4"):
        q = torch.log_softmax(whole.logits(tried(name)), -1)
        perplexity = float((-q.gather(-1, whole.ids[:, 1:, None])).mean().exp())
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert by_name[name].perplexity == pytest.approx(perplexity, rel=1e-6), name
        assert by_name[name].kl == pytest.approx(kl, rel=1e-6), name
    # what this model is known for: both features carry it, and the formats do not break it
    assert by_name["zero 507"].perplexity > by_name["zero 247"].perplexity > 4 * found.reference.perplexity
    assert by_name["int8_token"].kl < by_name["nvfp4"].kl < 1


def test_the_super_weight_of_the_model_comes_out_first(answers):
    """11.down_proj[507, 1229]: it alone costs much, a random weight of its matrix nothing, the next largest little."""
    _, found, _ = answers
    first = found.super_weights[0]
    assert f"{first.layer}.{first.module}[{first.row},{first.column}]" == SUPER
    weights = {(change.weight, change.group): change for change in found.changes if change.kind == "weight"}
    assert weights[SUPER, "given"].perplexity > 3 * found.reference.perplexity
    random, nearest = (change for change in found.changes if change.control_of == SUPER)
    assert random.kl < 1e-3 * weights[SUPER, "given"].kl
    # the next largest of the matrix is in the same row: it costs a tenth
    assert nearest.kl < 0.2 * weights[SUPER, "given"].kl


def test_its_checks_stand_beside_the_numbers(answers):
    study, found, _ = answers
    assert found.gates.reference.compared and found.gates.reference.value == 0
    assert found.gates.identity.value == 0 and found.gates.prefix_sharing
    assert 0 <= found.gates.floor.value < 1e-6
    assert json.loads(found.model_dump_json())["capture_id"] == study.capture_id
