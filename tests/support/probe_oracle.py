"""A probe's numbers by another way: whole logits in float64, hooks of this file, the definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.probe.run import probe
from outliers.publish.contents import check_probes, check_sensitivity
from outliers.quantization.emulate import emulate, emulate_weight
from outliers.spec.formats import parse_format
from outliers.study.probes import probe_folder
from tests.support.captured import prepared
from tests.support.synthetic import Silent

SITES = ("attn_in", "mlp_in", "o_in", "down_in")
DENSE = {"sites": SITES, "perplexity": True, "batch_sequences": 2}


def study_of(workspace, folder, text, asked, **parts):
    capture = parts.pop("capture", DENSE)
    return prepared(
        workspace, folder, text, sequences=5, capture=capture, criteria={"site": "block"}, probe=asked, **parts
    )


def made(world, asked, **parts):
    """probes.json and the rows of sensitivity.parquet of a probe."""
    workspace, folder, text = world
    study = study_of(workspace, folder, text, asked, **parts)
    probe(study, workspace, Silent())
    return study, *numbers_of(study, workspace)


def numbers_of(study, workspace):
    folder = probe_folder(study, workspace) / "numbers"
    data = (folder / "probes.json").read_bytes()
    found = check_probes(data)
    return found, check_sensitivity((folder / "sensitivity.parquet").read_bytes(), found)


class Oracle:
    """The whole model on one batch after another, whole logits in float64; hooks are those of this class."""

    def __init__(self, study, workspace):
        self.model = load_model(study.model, workspace, "cpu", head=True)
        corpus = load_corpus(study.corpus, workspace)
        self.ids = torch.from_numpy(corpus.token_ids.astype(np.int64))
        self.layers = self.model.model.layers

    def logits(self, hooks=(), prefix=()):
        handles = [hook() for hook in hooks]
        try:
            with torch.inference_mode():
                own = torch.cat([torch.tensor([list(prefix)] * len(self.ids), dtype=torch.int64), self.ids], 1)
                parts = [self.model(own[at : at + 2]).logits for at in range(0, len(own), 2)]
            return torch.cat(parts)[:, len(prefix) : -1].double()
        finally:
            for handle in handles:
                handle.remove()

    def on(self, module, change):
        """A hook that changes what a module receives."""
        return lambda: module.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))

    def at(self, site, layer, change):
        block = self.layers[layer]
        modules = {
            "attn_in": (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            "mlp_in": (block.mlp.gate_proj, block.mlp.up_proj),
            "o_in": (block.self_attn.o_proj,),
            "down_in": (block.mlp.down_proj,),
        }
        return [self.on(module, change) for module in modules[site]]

    def everywhere(self, sites, change):
        """change(site, layer) -> a function of a tensor."""
        return [hook for layer in range(3) for site in sites for hook in self.at(site, layer, change(site, layer))]


def measures(untouched, changed, ids):
    """(perplexity, kl, top-1 probability, agreement) by the definitions."""
    p, q = torch.log_softmax(untouched, -1), torch.log_softmax(changed, -1)
    nll = -q.gather(-1, ids[:, 1:, None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return float(nll.exp()), float(kl), float(q.exp().amax(-1).mean()), float(agreement)


def assert_same(change, wanted, tolerance=1e-6):
    found = (change.perplexity, change.kl, change.top1_probability, change.agreement)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-12), change.name


def zero(features):
    def change(x):
        made = x.clone()
        made[..., list(features)] = 0
        return made

    return change


def replaced(acts, change):
    """Features replaced by the mean of the captured values (sequence, position, feature)."""
    means = torch.from_numpy(acts.mean((0, 1))).float()

    def replace(x):
        made = x.clone()
        for feature in change.features:
            made[..., feature] = means[feature]
        return made

    return replace


def quantizer(acts, change, site):
    """A format with the range of the captured values (sequence, position, feature), as the definition has it."""
    form = parse_format(change.format)
    held = None
    if change.held and site in ("attn_in", "mlp_in"):
        held = torch.zeros(acts.shape[-1], dtype=torch.bool)
        held[change.held] = True
    values = np.abs(acts[:, 1:] if change.range == "without_first_tokens" else acts)
    if held is not None:
        values = values * ~held.numpy()
    amax = None
    if form.is_static:
        amax = torch.from_numpy(values.max((0, 1))).float() if form.base == "int8_channel" else float(values.max())
    return lambda x: emulate(x, form, amax=amax, held=held)


def hadamard(width):
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(width)


def rotated(oracle, untouched, acts, held):
    """NVFP4 of values rotated in blocks of 16, its global range of the rotated values."""

    def change(site, layer):
        values = acts[site][layer].copy()
        own = held if site in ("attn_in", "mlp_in") else ()
        values[..., list(own)] = 0
        blocks = values.reshape(*values.shape[:-1], -1, 16) @ hadamard(16)
        mask = torch.zeros(values.shape[-1], dtype=torch.bool)
        mask[list(own)] = True
        form = parse_format("had16+nvfp4")
        return lambda x: emulate(x, form, amax=float(np.abs(blocks).max()), held=mask if own else None)

    return measures(untouched, oracle.logits(oracle.everywhere(SITES, change)), oracle.ids)


def weights_of(oracle, site, layer):
    block = oracle.layers[layer]
    return {
        "attn_in": (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
        "mlp_in": (block.mlp.gate_proj, block.mlp.up_proj),
        "o_in": (block.self_attn.o_proj,),
        "down_in": (block.mlp.down_proj,),
    }[site]


def scales(oracle, acts, site, layer, originals=None):
    """s_j = max|x_j|^0.5 / max|w_j|^0.5."""
    values = np.abs(acts[site][layer]).max((0, 1))
    columns = [
        (originals[module] if originals else module.weight).detach().double().abs().amax(0)
        for module in weights_of(oracle, site, layer)
    ]
    return torch.from_numpy(values).sqrt() / torch.stack(columns).amax(0).clamp(min=1e-5).sqrt()


def smoothed(oracle, untouched, acts, name, originals):
    form = parse_format(name)
    known = oracle.originals if originals else None

    def change(site, layer):
        s = scales(oracle, acts, site, layer, known).clamp(min=1e-5)
        amax = float((torch.from_numpy(np.abs(acts[site][layer]).max((0, 1))) / s).max())
        own = s.float()
        return lambda x: emulate(x / own, form, amax=amax) * own

    return measures(untouched, oracle.logits(oracle.everywhere(SITES, change)), oracle.ids)


class quantized:
    """The weights behind the sites quantized, in the oracle's model, for the time of a block."""

    def __init__(self, oracle, acts, smooth):
        self.oracle, self.acts, self.smooth = oracle, acts, smooth

    def __enter__(self):
        oracle = self.oracle
        form = parse_format("int8_channel")
        places = [(site, layer) for layer in range(3) for site in SITES]
        oracle.originals = {m: m.weight.detach().clone() for p in places for m in weights_of(oracle, *p)}
        for site, layer in places:
            s = scales(oracle, self.acts, site, layer, oracle.originals).float().clamp(min=1e-5)
            for module in weights_of(oracle, site, layer):
                w = oracle.originals[module]
                module.weight.data = emulate_weight(w * s, form) / s if self.smooth else emulate_weight(w, form)

    def __exit__(self, *_):
        for module, weight in self.oracle.originals.items():
            module.weight.data = weight
