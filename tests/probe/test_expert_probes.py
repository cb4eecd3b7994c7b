"""Probes of experts: every number against the oracle, what a check chooses, what is refused, and what the page says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import outliers.probe.run as run
from outliers.advice.advise import advise
from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import analyze
from outliers.errors import BadInput
from outliers.probe.engine import Engine
from outliers.probe.run import probe
from outliers.quantization.emulate import emulate
from outliers.report.probe_page import make_probe_page
from outliers.report.probe_plots import draw_experts
from outliers.spec.formats import parse_format
from outliers.study.probes import count_passes, probe_folder, probe_id
from outliers.workspace import open_workspace
from tests.support import probed, tiny
from tests.support.captured import prepared
from tests.support.probe_oracle import assert_same, measures, numbers_of
from tests.support.synthetic import Silent

SITES = ("attn_in", "mlp_in")
CAPTURE = {"sites": SITES, "perplexity": True, "batch_sequences": 2}


def study_of(world, asked, **parts):
    workspace, folder, text = world
    return prepared(
        workspace, folder, text, sequences=5, capture=CAPTURE | parts.pop("capture", {}), probe=asked, **parts
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory, text):
    """A captured and counted study of a tiny Qwen3Moe, 5 sequences in batches of 2."""
    workspace = open_workspace(tmp_path_factory.mktemp("experts") / "w")
    folder = tiny.make_model(tmp_path_factory.mktemp("moe") / "model", "Qwen3Moe")
    found = workspace, folder, text
    study = study_of(found, {"probe": "check"})
    extract(study, workspace, Silent())
    analyze(study, workspace, Silent())
    return found


class Experts:
    """The whole model on the batches of the study, logits in float64; its own hooks and weights."""

    def __init__(self, study, workspace):
        self.model = load_model(study.model, workspace, "cpu", head=True)
        corpus = load_corpus(study.corpus, workspace)
        self.ids = torch.from_numpy(corpus.token_ids.astype(np.int64))

    def logits(self):
        with torch.inference_mode():
            parts = [self.model(self.ids[at : at + 2]).logits for at in range(0, len(self.ids), 2)]
        return torch.cat(parts)[:, :-1].double()

    def without(self, experts):
        kept = {}
        for name in experts:
            layer, expert = map(int, name.split("."))
            weight = self.model.model.layers[layer].mlp.experts.down_proj
            kept[layer, expert] = weight.data[expert].clone()
            weight.data[expert] = 0
        try:
            return self.logits()
        finally:
            for (layer, expert), own in kept.items():
                self.model.model.layers[layer].mlp.experts.down_proj.data[expert] = own

    def largest(self):
        """The expert with the largest output in magnitude over the tokens that are routed to it."""
        best = {}
        for number, layer in enumerate(self.model.model.layers):

            def after(_module, args, _output, number=number, experts=layer.mlp.experts):
                hidden, index, _ = args
                for x, chosen in zip(hidden, index.tolist(), strict=True):
                    for expert in chosen:
                        gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                        out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                        name = f"{number}.{expert}"
                        best[name] = max(best.get(name, 0.0), float(out.abs().max()))

            layer.mlp.experts._own = layer.mlp.experts.register_forward_hook(after)
        self.logits()
        for layer in self.model.model.layers:
            layer.mlp.experts._own.remove()
        return max(best, key=best.get)

    def tokens(self, name):
        layer, expert = map(int, name.split("."))
        seen = []
        handle = self.model.model.layers[layer].mlp.gate.register_forward_hook(lambda _m, _a, out: seen.append(out[2]))
        self.logits()
        handle.remove()
        return int((torch.cat(seen) == expert).sum())


def test_every_number_of_a_probe_of_experts(world):
    """Experts named by hand and their controls, and a format at the experts' inputs, against whole logits."""
    workspace = world[0]
    study = study_of(world, {"experts": ("1.2", "2.0"), "quantize": ("int8_token", "nvfp4")})
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    assert found.gates.identity.value == 0 and found.gates.reference.value == 0 and found.gates.prefix_sharing
    oracle = Experts(study, workspace)
    untouched = oracle.logits()
    silent = [change for change in found.changes if change.kind == "silence"]
    assert [change.group for change in silent] == ["given", "random", "load", "given", "random", "load"]
    for change in silent:
        (name,) = change.experts
        assert change.name.startswith(f"expert {name}") and change.layers == [int(name[0])]
        assert change.expert_tokens == [oracle.tokens(name)]
        assert change.control_of == (None if change.group == "given" else f"{name[0]}.{ {'1': 2, '2': 0}[name[0]] }")
        assert_same(change, measures(untouched, oracle.without(change.experts), oracle.ids))
    inputs = [change for change in found.changes if change.kind == "experts"]
    assert [(change.name, change.group, change.sites, change.layers) for change in inputs] == [
        (f"{form}, experts alone", form, ["mlp_in"], [0, 1, 2]) for form in ("int8_token", "nvfp4")
    ]
    oracle_inputs(oracle, untouched, inputs[0], "int8_token")
    whole = next(change for change in found.changes if change.name == "int8_token")
    assert 0 < inputs[0].kl != whole.kl
    content = json.loads((probe_folder(study, workspace) / "numbers" / "probes.json").read_bytes())
    assert all(("experts" in row) == (row["kind"] == "silence") for row in content["changes"])
    assert any("nothing is renormalised" in note for note in found.notes)
    assert draw_experts(found).name == "experts.png"


def oracle_inputs(oracle, untouched, change, name):
    """The experts alone receive rounded values: their router and the other readers do not."""
    form = parse_format(name)
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: (emulate(args[0], form), *args[1:]))
        for layer in oracle.model.model.layers
    ]
    logits = oracle.logits()
    for handle in handles:
        handle.remove()
    assert_same(change, measures(untouched, logits, oracle.ids))


def named(world, study, experts):
    """Results that name super experts, as summary.json has them; -1 is a shared one, which no router weighs."""
    folder = world[0].study(study.study_id)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"layer": layer, "expert": expert} for layer, expert in experts]
    block = {"super_experts": {"experts": rows}}
    (folder / "summary.json").write_text(json.dumps({"study_id": study.study_id, "systematic": [], "experts": block}))


def test_super_experts_are_silenced_alone_and_together(world):
    """Each has a random control and one of equal load, and all together as many of these; named by results of another capture."""
    workspace = world[0]
    study = study_of(world, {"experts": ("super",)}, capture={"experts": "off"})
    extract(study, workspace, Silent())
    named(world, study, [(1, 3), (0, 2), (1, -1)])
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    silent = [change for change in found.changes if change.kind == "silence"]
    assert [(change.group, change.control_of) for change in silent] == [
        ("super", None),
        ("random", "1.3"),
        ("load", "1.3"),
        ("super", None),
        ("random", "0.2"),
        ("load", "0.2"),
        ("super", None),
        ("random", "super experts"),
        ("load", "super experts"),
    ]
    assert silent[6].experts == ["1.3", "0.2"] and silent[6].name == "super experts"
    oracle = Experts(study, workspace)
    untouched = oracle.logits()
    for change in silent:
        assert_same(change, measures(untouched, oracle.without(change.experts), oracle.ids))
        assert change.expert_tokens == [oracle.tokens(name) for name in change.experts]


def test_a_check_takes_the_super_expert_that_the_study_found(world):
    """Of 12 experts one can be above P99.5: the one with the largest output, found here by a loop over tokens."""
    workspace = world[0]
    study = study_of(world, {"probe": "check"})
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    silent = [change for change in found.changes if change.kind == "silence"]
    assert [change.group for change in silent] == ["super", "random", "load"]
    assert silent[0].experts == [Experts(study, workspace).largest()]
    assert {change.group for change in found.changes if change.kind == "experts"} == {
        "int8_token",
        "fp8_token",
        "mxfp4_even",
        "nvfp4",
    }


def test_a_study_that_names_none_says_so(world):
    """Where routing alone was read, nothing is known of outputs."""
    workspace = world[0]
    study = study_of(world, {"probe": "check", "probe_sequences": 2}, capture={"experts": "routing"})
    extract(study, workspace, Silent())
    analyze(study, workspace, Silent())
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    assert "the study says nothing of super experts: none was silenced" in found.notes
    assert not [change for change in found.changes if change.kind == "silence"]


def test_a_probe_of_experts_that_is_stopped_ends_with_the_same_bits(world, monkeypatch):
    """An error at the start of a pass, each time a later one: what is left is measured, and every file is the same."""
    workspace = world[0]
    study = study_of(world, {"experts": ("1.2",), "probe_sequences": 4})
    probe(study, workspace, Silent())
    folder = probe_folder(study, workspace)
    wanted = (folder / "numbers" / "probes.json").read_bytes()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    forward, left = Engine.forward, [0]

    def failing(self, batch, **options):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("stopped")
        return forward(self, batch, **options)

    monkeypatch.setattr(Engine, "forward", failing)
    # in the statistics, in the comparison of shared layers, in the first group of changes, and twice in the second batch
    for passes in (1, 2, 5, 10, 3):
        left[0] = passes
        with pytest.raises(RuntimeError, match="stopped"):
            probe(study, workspace, Silent())
    left[0] = 1_000
    probe(study, workspace, Silent())
    assert (folder / "numbers" / "probes.json").read_bytes() == wanted


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("1.4",), "each layer of .* has the experts 0 to 3"),
        (("3.0",), "layer 3 is not one of the study's layers with experts, which are 0-2"),
        (("super",), "says nothing of super experts here: run it with --experts all"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(world, monkeypatch, asked, said):
    off = {"experts": "off"} if asked == ("super",) else {}
    monkeypatch.setattr(run, "load_model", lambda *_args, **_options: pytest.fail("a model was loaded"))
    with pytest.raises(BadInput, match=said):
        probe(study_of(world, {"experts": asked}, capture=off, label="refused"), world[0], Silent())


def test_a_dense_model_has_no_experts_to_silence(workspace, llama, text):
    study = prepared(workspace, llama, text, capture=CAPTURE, probe={"experts": ("1.0",)})
    with pytest.raises(BadInput, match="is a dense model and has no experts"):
        probe(study, workspace, Silent())


@pytest.mark.parametrize("name", ["1", "1.x", "-1.2", "1.2.3", "auto"])
def test_what_is_no_expert_is_refused(world, name):
    with pytest.raises(ValidationError, match=r"is not LAYER\.EXPERT such as 1\.68, or super"):
        study_of(world, {"experts": (name,)})


def test_the_id_depends_on_the_experts_where_some_are_named(world):
    plain = study_of(world, {"zero": ("3",)})
    assert "experts" in plain.spec.probe.model_dump()
    named_ = study_of(world, {"zero": ("3",), "experts": ("1.2",)})
    assert probe_id(named_) != probe_id(plain)
    assert probe_id(study_of(world, {"experts": ("01.2",)})) == probe_id(study_of(world, {"experts": ("1.02",)}))


def test_passes_are_counted_from_above(world):
    """No probe of experts takes more passes than its plan says."""
    for asked in ({"experts": ("1.2", "0.1")}, {"quantize": ("int8_token",), "experts": ("1.2",)}):
        study = study_of(world, asked)
        probe(study, world[0], Silent())
        changes = len(numbers_of(study, world[0])[0].changes)
        assert changes <= count_passes(study.spec, 3, has_experts=True) - 6
        assert count_passes(study.spec, 3) < count_passes(study.spec, 3, has_experts=True)


def without_one(name, perplexity, group, of=None):
    return probed.change(
        name, "silence", group=group, sites=[], layers=[1], experts=["1.68"], expert_tokens=[9], control_of=of
    ).model_copy(update={"perplexity": perplexity})


def test_the_verdict_and_the_page_name_experts_beside_their_controls():
    """A format at the experts' inputs alone does not count as a trial of the format."""
    alone = [
        without_one("expert 1.68", 250.0, "super"),
        without_one("expert 1.7 (random, beside 1.68)", 17.0, "random", "1.68"),
        without_one("expert 1.9 (load, beside 1.68)", 18.0, "load", "1.68"),
    ]
    inputs = probed.change("int8_token, experts alone", "experts", kl=0.7, format="int8_token", sites=["mlp_in"])
    made = probed.probes(probed.change("int8_token", kl=0.03, format="int8_token"), inputs, *alone)
    found = advise(made, [])
    assert [(item.format, item.confirmed_kl) for item in found.formats] == [("int8_token", 0.03)]
    assert found.formats[0].repairs == []
    said = (
        "Without expert 1.68 the perplexity is 250, without expert 1.7 (random, beside 1.68) 17, "
        "without expert 1.9 (load, beside 1.68) 18."
    )
    assert said in found.paragraph
    page = make_probe_page(made, [], found).decode()
    assert said in page and "Perplexity where experts are silent" in page and page.count("<img") == 2
    together = [
        without_one("super experts", 900.0, "super"),
        without_one("as many random experts", 19.0, "random", "super experts"),
    ]
    found = advise(probed.probes(*alone, *together), [])
    assert "Without the super experts the perplexity is 900, without as many random experts 19." in found.paragraph
