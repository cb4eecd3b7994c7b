"""Silent experts: bit-equal to a model whose expert has no second projection; their controls; what is refused and said."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import outliers.probe.run as run
from outliers.advice.advise import advise
from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import analyze
from outliers.errors import BadInput, SiteError
from outliers.probe.changes import Change
from outliers.probe.engine import Batch, Engine
from outliers.probe.expert_choice import ExpertChoice, choose_controls, choose_experts
from outliers.probe.run import probe
from outliers.probe.silence import count_load, silenced
from outliers.quantization.emulate import emulate
from outliers.report.probe_page import make_probe_page
from outliers.report.probe_plots import draw_experts
from outliers.spec.formats import parse_format
from outliers.study.probes import count_passes, probe_folder, probe_id
from outliers.workspace import open_workspace
from tests.probe.test_families import engine_of
from tests.support import probed, tiny
from tests.support.captured import prepared
from tests.support.probe_oracle import assert_same, measures, numbers_of
from tests.support.synthetic import Silent

FAMILIES = [
    name for name in tiny.CONFIGS if "oe" in name or name in ("Mixtral", "GptOss", "Llama4", "DeepseekV3", "Qwen3Next")
]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
LENGTHS = (12, 7)


def modules_of(engine):
    """layer -> its module of experts, by the path alone."""
    found = {}
    for name, module in engine.base.named_modules():
        if name.endswith(".experts"):
            found[int(name.split(".")[-3])] = module
    return found


def without(engine, batch, experts):
    """The last hidden state of a copy whose experts have no second projection."""
    model = copy.deepcopy(engine.model)
    base = model.get_submodule(engine.anatomy.backbone)
    for layer, expert in experts:
        module = modules_of(Engine(model, engine.anatomy, {}))[layer]
        with torch.no_grad():
            module.down_proj[expert] = 0
            if hasattr(module, "down_proj_bias"):
                module.down_proj_bias[expert] = 0
    mask = torch.tensor([[place < length for place in range(12)] for length in batch.lengths])
    with torch.inference_mode():
        return base(input_ids=batch.ids, attention_mask=None if mask.all() else mask.long(), use_cache=False)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_expert_is_one_without_its_second_projection(family):
    engine, batch, _, _ = engine_of(family)
    modules, layers = modules_of(engine), engine.anatomy.moe_layers
    assert tuple(modules) == layers
    engine.silent_layers = layers
    for implementation in IMPLEMENTATIONS if family != "Llama4" else ("eager",):
        engine.model.set_experts_implementation(implementation)
        untouched = engine.forward(batch)
        same = engine.run(Change("identity", "identity", (), layers), batch, None, None)
        assert torch.equal(same, untouched)
        moved = []
        for experts in ([(layers[0], 1)], [(layers[-1], 3)], [(layers[0], 0), (layers[0], 2), (layers[-1], 1)]):
            change = Change("", "silence", layers=tuple({layer for layer, _ in experts}), experts=tuple(experts))
            found = engine.run(change, batch, None, None)
            assert torch.equal(found, without(engine, batch, experts)), (implementation, experts)
            moved.append(not torch.equal(found, untouched))
        assert any(moved)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_is_what_each_token_chooses(family):
    """Against the router's own choice for each token, in a loop; padding is left out, and added up over passes."""
    engine, batch, _, _ = engine_of(family)
    batch = Batch(batch.sequences, batch.ids, LENGTHS, 2)
    modules = modules_of(engine)
    routers = {layer: engine.base.get_submodule(engine.anatomy.router.replace("*", str(layer))) for layer in modules}
    wanted = {layer: np.zeros(4) for layer in modules}

    def see(layer):
        def after(_module, _args, output):
            if family == "Llama4":
                chosen = [set(np.flatnonzero(row).tolist()) for row in output[0].numpy()]
            else:
                index = next(part for part in output if not part.is_floating_point())
                chosen = [set(row) for row in index.tolist()]
            for sequence, length in enumerate(LENGTHS):
                for position in range(length):
                    for expert in chosen[sequence * 12 + position]:
                        wanted[layer][expert] += 1

        return after

    handles = [router.register_forward_hook(see(layer)) for layer, router in routers.items()]
    load = {layer: np.zeros(4) for layer in modules}
    for _ in range(2):
        with count_load(modules, load, LENGTHS, engine.now):
            engine.forward(batch)
    for handle in handles:
        handle.remove()
    slots = 1 if family == "Llama4" else 2
    for layer, own in wanted.items():
        assert own.sum() == 2 * 19 * slots
        assert load[layer].tolist() == own.tolist()


def test_experts_that_receive_something_else_are_refused():
    """Kernels that sort the tokens before give neither the chosen experts nor their weights."""

    class Kernel(torch.nn.Module):
        def forward(self, hidden, routing, gather):
            return hidden

    engine, _, _, _ = engine_of("Mixtral")
    engine.now.sequences, engine.now.positions = 1, 4
    hidden, routing = torch.zeros(4, 8), torch.zeros(4, 4)
    kernel = Kernel()
    with (
        silenced({1: kernel}, {1: {0}}, engine.now),
        pytest.raises(SiteError, match=r"layer 1 .Kernel. receive .*neither"),
    ):
        kernel(hidden, routing, torch.zeros(8, dtype=torch.int32))
    assert not kernel._forward_pre_hooks


def test_experts_with_a_bias_are_not_silenced_by_their_input():
    class Biased(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 8, 4))

        def forward(self, hidden):
            return hidden + 1

    engine, _, _, _ = engine_of("Llama4")
    engine.now.sequences, engine.now.positions = 1, 4
    biased = Biased()
    with (
        silenced({0: biased}, {0: {1}}, engine.now),
        pytest.raises(SiteError, match="gives more than 0 for an input of 0"),
    ):
        biased(torch.ones(8, 8))


@settings(deadline=None)
@given(
    load=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    expert=st.integers(0, 11),
    others=st.sets(st.integers(0, 11), max_size=4),
)
def test_controls_are_reached_and_the_one_of_equal_load_is_nearest(load, expert, others):
    expert %= len(load)
    counts = np.array(load, np.int64)
    found = choose_controls(counts, expert, others, "seed")
    left = [number for number, count in enumerate(load) if count and number != expert and number not in others]
    assert set(found.values()) <= set(left)
    assert len(found) == len(set(found.values())) == min(2, len(left))
    if left:
        distances = {number: abs(load[number] - load[expert]) for number in left}
        nearest = [number for number in left if distances[number] == min(distances.values())]
        assert found["load"] == nearest[0]
    assert found == choose_controls(counts, expert, others, "seed")


def test_the_random_control_hangs_on_the_seed():
    counts = np.full(64, 5)
    drawn = {choose_controls(counts, 3, (), f"seed {number}")["random"] for number in range(40)}
    assert len(drawn) > 20 and 3 not in drawn


def test_super_experts_that_no_token_reaches_are_unknown():
    load = {1: np.array([3, 0, 2, 5]), 2: np.array([1, 1, 0, 0])}
    wanted = [((1, 1), "super"), ((1, 3), "super"), ((2, 0), "super"), ((2, 3), "asked")]
    found = choose_experts(wanted, load, "s")
    assert found.unreached == ((1, 1), (2, 3)) and found.together == ((1, 3), (2, 0)) and found.layers == (1, 2)
    names = [(one.at, one.role, one.of, one.tokens) for one in found.singles]
    assert names[0] == ((1, 3), "super", None, 5)
    assert {names[1][0], names[2][0]} == {(1, 0), (1, 2)} and {names[1][1], names[2][1]} == {"random", "load"}
    # expert 0 of layer 1 has 3 tokens and is nearest to 5
    assert [at for at, role, _, _ in names if role == "load"] == [(1, 0), (2, 1)]
    assert found.load == ((1, 0), (2, 1)) and found.random == ()  # layer 2 has one other that is reached
    assert ExpertChoice().layers == ()


def test_super_experts_of_one_layer_stand_beside_different_ones():
    load = {0: np.array([4, 4, 4, 4, 9, 9, 9, 9, 0])}
    found = choose_experts([((0, 0), "super"), ((0, 1), "super"), ((0, 2), "super")], load, "s")
    assert found.load == ((0, 3), (0, 4), (0, 5))
    assert len(set(found.random)) == 3 and not {(0, 0), (0, 1), (0, 2), (0, 8)} & set(found.random)
    many = {0: np.full(40, 3)}
    found = choose_experts([((0, number), "super") for number in range(12)], many, "s")
    assert len(found.together) == len(set(found.load)) == len(set(found.random)) == 12
    assert [one.at[1] for one in found.singles if one.role == "super"] == list(range(8))


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
    """Experts named by hand and their controls, and a format at the experts' inputs, beside whole logits."""
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
    """Beside a random one and one of equal load each, and beside as many of these; named by results of another capture."""
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
        (("3.0",), "layer 3 is none of the study's layers with experts, which are 0-2"),
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
    """A format at the experts' inputs alone is no try of the format."""
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
