"""Every number of a probe on a tiny model against the same from whole logits in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from outliers.capture.extract import extract
from outliers.probe.run import probe
from outliers.quantization.emulate import emulate
from outliers.spec.formats import parse_format
from outliers.study.probes import probe_folder
from tests.support import tiny
from tests.support.captured import prepared, stored
from tests.support.probe_oracle import (
    SITES,
    Oracle,
    assert_same,
    made,
    measures,
    numbers_of,
    quantized,
    quantizer,
    replaced,
    rotated,
    smoothed,
    zero,
)
from tests.support.synthetic import Silent


def test_every_number_of_a_check_is_that_of_whole_logits(world):
    """Zeroed and replaced features, formats and held ones, in float32."""
    workspace, _, _ = world
    study, found, rows = made(world, {"probe": "check"})
    oracle = Oracle(study, workspace)
    untouched = oracle.logits()
    p = torch.log_softmax(untouched, -1)
    nll = float(-p.gather(-1, oracle.ids[:, 1:, None]).mean())
    assert found.reference.nll == pytest.approx(nll, rel=1e-9)
    assert found.reference.perplexity == pytest.approx(math.exp(nll), rel=1e-9)
    assert found.reference.top1_probability == pytest.approx(float(p.exp().amax(-1).mean()), rel=1e-9)
    assert found.tokens == 5 * 23 and found.sequences == 5 and rows == []
    acts = {site: stored(workspace, study, site).astype(np.float64) for site in SITES}
    groups = [change.group for change in found.changes if change.kind == "zero"]
    assert groups == ["systematic", "matched", *["random"] * 5]
    systematic = next(change for change in found.changes if change.group == "systematic").features
    assert tiny.PLANTED in systematic
    for change in found.changes:
        if change.kind == "zero":
            hooks = oracle.everywhere(("attn_in", "mlp_in"), lambda s, n, own=change: zero(own.features))
        elif change.kind == "mean":
            hooks = oracle.everywhere(("attn_in", "mlp_in"), lambda s, n, own=change: replaced(acts[s][n], own))
        else:
            hooks = oracle.everywhere(SITES, lambda s, n, own=change: quantizer(acts[s][n], own, s))
        assert_same(change, measures(untouched, oracle.logits(hooks), oracle.ids))
        assert change.kl_interval is None and change.perplexity_interval is None
    held = [change for change in found.changes if change.held]
    assert len(held) == 4 and all(change.held == sorted(systematic) for change in held)
    assert any("under 16" in note for note in found.notes)


def test_the_matched_features_are_the_largest_others(world):
    workspace, _, _ = world
    study, found, _ = made(world, {"probe": "check"})
    largest = np.max([np.abs(stored(workspace, study, site)).max((0, 1, 2)) for site in ("attn_in", "mlp_in")], axis=0)
    groups = {change.group: change.features for change in found.changes if change.kind == "zero"}
    others = [f for f in np.argsort(-largest, kind="stable").tolist() if f not in groups["systematic"]]
    assert groups["matched"] == others[: len(groups["systematic"])]
    random = [change.features[0] for change in found.changes if change.kind == "zero" and change.group == "random"]
    assert len(set(random)) == 5 and not set(random) & {*groups["systematic"], *groups["matched"]}


def test_numbers_smoothing_weights_and_static_ranges(world):
    """What is named by number; SmoothQuant, weights and both static ranges, each against the definition."""
    workspace, _, _ = world
    asked = {
        "zero": ("3", "11"),
        "quantize": ("int8_tensor", "had16+nvfp4", "int8_channel"),
        "hold": ("3",),
        "weights": "int8_channel",
        "smooth": (0.5,),
    }
    study, found, _ = made(world, asked)
    names = [change.name for change in found.changes]
    assert names[:3] == ["zero 3,11", "zero 3", "zero 11"]
    by_name = {change.name: change for change in found.changes}
    oracle = Oracle(study, workspace)
    untouched = oracle.logits()
    acts = {site: stored(workspace, study, site).astype(np.float64) for site in SITES}
    for change in found.changes:
        if change.kind == "zero":
            hooks = oracle.everywhere(("attn_in", "mlp_in"), lambda s, n, own=change: zero(own.features))
            assert_same(change, measures(untouched, oracle.logits(hooks), oracle.ids))
        elif change.weights is None and change.smooth is None and "had" not in change.name:
            hooks = oracle.everywhere(SITES, lambda s, n, own=change: quantizer(acts[s][n], own, s))
            assert_same(change, measures(untouched, oracle.logits(hooks), oracle.ids))
    assert by_name["int8_tensor, range without first tokens"].range == "without_first_tokens"
    assert by_name["int8_tensor"].ranges_of == "study"
    assert by_name["int8_tensor, range without first tokens"].ranges_of == "probe"
    assert_same(by_name["had16+nvfp4, held"], rotated(oracle, untouched, acts, held=(3,)))
    assert_same(by_name["had16+nvfp4"], rotated(oracle, untouched, acts, held=()))
    assert_same(by_name["int8_tensor, smooth 0.5"], smoothed(oracle, untouched, acts, "int8_tensor", None))
    both = by_name["int8_tensor, smooth 0.5, weights int8_channel"]
    with quantized(oracle, acts, smooth=True):
        assert_same(both, smoothed(oracle, untouched, acts, "int8_tensor", "as they are"))
    with quantized(oracle, acts, smooth=False):
        assert_same(by_name["weights int8_channel"], measures(untouched, oracle.logits(), oracle.ids))
        hooks = oracle.everywhere(SITES, lambda s, n: quantizer(acts[s][n], by_name["int8_tensor"], s))
        assert_same(by_name["int8_tensor, weights int8_channel"], measures(untouched, oracle.logits(hooks), oracle.ids))


def test_a_map_and_what_it_predicts(world):
    """Each place alone against the definition; squared errors and predictions by hand; the joint prediction is their sum."""
    workspace, _, _ = world
    study, found, rows = made(world, {"map": "int8_token", "quantize": ("int8_token", "int4_token", "nvfp4")})
    oracle = Oracle(study, workspace)
    untouched = oracle.logits()
    acts = {site: stored(workspace, study, site).astype(np.float64) for site in SITES}
    assert found.gates.prefix_sharing
    cells = {(change.sites[0], change.layers[0]): change for change in found.changes if change.kind == "map"}
    assert set(cells) == {(site, layer) for site in SITES for layer in range(3)}
    for (site, layer), change in cells.items():
        hooks = oracle.at(site, layer, quantizer(acts[site][layer], change, site))
        assert_same(change, measures(untouched, oracle.logits(hooks), oracle.ids))
    errors = {}
    for row in rows:
        values = torch.from_numpy(acts[row["site"]][row["layer"]]).float()
        amax = float(values.abs().max()) if row["format"] == "nvfp4" else None
        lost = (emulate(values, parse_format(row["format"]), amax=amax).double() - values.double()).square().sum()
        assert row["squared_error"] == pytest.approx(float(lost) / (5 * 24), rel=1e-6)
        assert row["relative_error"] == pytest.approx(float(lost / values.double().square().sum()), rel=1e-6)
        errors[row["site"], row["layer"], row["format"]] = float(lost)
        kl = cells[row["site"], row["layer"]].kl
        assert row["kl"] == (kl if row["format"] == "int8_token" else None)
        ratio = errors[row["site"], row["layer"], row["format"]] / errors[row["site"], row["layer"], "int8_token"]
        assert row["predicted_kl"] == pytest.approx(kl * ratio, rel=1e-6)
    assert len(rows) == 12 * 3
    for change in found.changes:
        if change.kind == "quantize":
            own = sum(row["predicted_kl"] for row in rows if row["format"] == change.format)
            assert change.predicted_kl == pytest.approx(own, rel=1e-12)


def test_a_prefix_stays_as_it_is_and_is_not_counted(world):
    workspace, _, _ = world
    study, found, _ = made(world, {"prefix": "256,65", "quantize": ("int8_token", "int8_tensor")})
    oracle = Oracle(study, workspace)
    untouched = oracle.logits()
    by_name = {change.name: change for change in found.changes}
    assert by_name["prefix"].prefix == [256, 65] and by_name["int8_token"].prefix == []
    before = oracle.logits(prefix=(256, 65))
    assert_same(by_name["prefix"], measures(untouched, before, oracle.ids))
    seen = {}

    def look(site, layer):
        def change(x):
            seen.setdefault((site, layer), []).append(x[:, 2:].abs().max())
            return x

        return change

    oracle.logits(oracle.everywhere(SITES, look), prefix=(256, 65))

    def behind(name):
        form = parse_format(name)

        def at(site, layer):
            amax = float(max(seen[site, layer])) if form.is_static else None

            def change(x):
                made = emulate(x, form, amax=amax)
                made[:, :2] = x[:, :2]
                return made

            return change

        return at

    for name in ("int8_token", "int8_tensor"):
        changed = oracle.logits(oracle.everywhere(SITES, behind(name)), prefix=(256, 65))
        assert_same(by_name[f"{name}, prefix"], measures(untouched, changed, oracle.ids))


def test_single_weights_with_their_controls(world):
    """A named weight by the end of its module's path, and the candidates of the pass, each with two others of its matrix."""
    workspace, _, _ = world
    study, found, _ = made(world, {"weight": ("1.q_proj[3,5]", "auto")})
    oracle = Oracle(study, workspace)
    untouched = oracle.logits()
    outputs = []
    for layer, block in enumerate(oracle.layers):
        pairs = []
        handle = block.mlp.down_proj.register_forward_hook(lambda _m, args, out, to=pairs: to.append((args[0], out)))
        oracle.logits()
        handle.remove()
        x, y = (torch.cat(part).reshape(5 * 24, -1) for part in zip(*pairs, strict=True))
        token, row = divmod(int(y.abs().argmax()), y.shape[1])
        weight = block.mlp.down_proj.weight.detach()
        outputs.append((float(y[token, row]), layer, row, int((weight[row] * x[token]).abs().argmax()), token))
    wanted = sorted(outputs, key=lambda one: -abs(one[0]))
    assert [(s.layer, s.row, s.column, 24 * s.sequence + s.position) for s in found.super_weights] == [
        one[1:] for one in wanted
    ]
    assert [s.output for s in found.super_weights] == pytest.approx([one[0] for one in wanted], rel=1e-6)
    weights = [change for change in found.changes if change.kind == "weight"]
    assert len(weights) == 4 * 3 and [change.group for change in weights[:3]] == ["given", "control", "control"]
    named = next(change for change in weights if change.weight == "1.self_attn.q_proj[3,5]")
    for change in weights:
        layer, _, rest = change.weight.partition(".")
        path, _, place = rest.removesuffix("]").partition("[")
        row, column = map(int, place.split(","))
        module = oracle.layers[int(layer)].get_submodule(path)
        original = module.weight.data.clone()
        assert change.value == float(original[row, column])
        module.weight.data[row, column] = 0
        assert_same(change, measures(untouched, oracle.logits(), oracle.ids))
        module.weight.data = original
    nearest = [change for change in weights if change.control_of == named.weight][1]
    sizes = (oracle.layers[1].self_attn.q_proj.weight.detach().abs() - abs(named.value)).abs().flatten()
    assert abs(abs(nearest.value) - abs(named.value)) == float(sizes.sort().values[1])


def test_intervals_are_of_paired_differences(workspace, llama, text):
    """Sixteen sequences: the ends of resamples drawn here, of sums a sequence in the journal."""
    study = prepared(
        workspace, llama, text, sequences=16, length=8, capture={"perplexity": True}, probe={"zero": ("7",)}
    )
    extract(study, workspace, Silent())
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    lines = [json.loads(line) for line in (probe_folder(study, workspace) / "journal.jsonl").open()]
    own = {(line["change"], line["sequence"]): line for line in lines}
    random = np.random.RandomState(0)
    kls, perplexities, agreements = [], [], []
    for _ in range(1000):
        drawn = random.randint(0, 16, 16)
        tokens = 7 * 16
        kls.append(sum(own["zero 7", s]["kl"] for s in drawn) / tokens)
        agreements.append(sum(own["zero 7", s]["agreement"] for s in drawn) / tokens)
        moved = sum(own["zero 7", s]["nll"] - own["untouched", s]["nll"] for s in drawn) / tokens
        perplexities.append(found.reference.perplexity * math.exp(moved))
    change = found.changes[0]
    for ends, values in (
        (change.kl_interval, kls),
        (change.perplexity_interval, perplexities),
        (change.agreement_interval, agreements),
    ):
        assert ends == pytest.approx([sorted(values)[25], sorted(values)[974]], rel=1e-9)
    assert change.kl_interval[0] < change.kl < change.kl_interval[1]


def test_changes_measured_together_have_the_bits_of_each_alone(world):
    """The untouched pass's log-probabilities are shared by a group: no change depends on the others in it."""
    names = ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10")
    _, together, _ = made(world, {"zero": names})
    for name in names[:3]:
        _, alone, _ = made(world, {"zero": (name,)})
        assert alone.changes[0] == next(change for change in together.changes if change.name == f"zero {name}")
