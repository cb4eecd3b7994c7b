"""A map over experts: the input of one expert alone is quantized, against the model's own parts put together by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import outliers.probe.run as run
from outliers.advice.advise import advise
from outliers.errors import BadInput, SiteError
from outliers.probe import expert_choice
from outliers.probe.changes import Change
from outliers.probe.expert_choice import mapped_experts
from outliers.probe.run import probe
from outliers.publish.contents import check_probes
from outliers.quantization.emulate import emulate
from outliers.report.probe_page import make_probe_page
from outliers.report.probe_plots import draw_expert_map
from outliers.results.write import json_bytes
from outliers.spec.formats import parse_format
from outliers.study.probes import count_passes, probe_folder, probe_id
from tests.probe.test_expert_probes import CAPTURE, Experts, study_of, world  # noqa: F401  # a fixture
from tests.probe.test_experts import FAMILIES, IMPLEMENTATIONS, modules_of
from tests.probe.test_families import engine_of
from tests.support import probed
from tests.support.captured import prepared
from tests.support.probe_oracle import assert_same, measures, numbers_of
from tests.support.synthetic import Silent

FORM = "int4_token"


def alone(module, expert):
    """A hook: what the experts give, less what the expert gives, and what it gives of quantized values; rows of others stay."""

    def after(own, args, kwargs, output):
        if busy:
            return output
        busy.append(None)
        try:
            if len(args) + len(kwargs) == 1:  # Llama 4: a copy an expert
                x = args[0].clone()
                tokens = x.shape[0] // own.gate_up_proj.shape[0]
                mine = slice(expert * tokens, (expert + 1) * tokens)
                x[mine] = emulate(x[mine], parse_format(FORM))
                return own(x)
            x, index, weights = (*args, *kwargs.values())
            mine = weights * (index == expert)
            return output - own(x, index, mine) + own(emulate(x, parse_format(FORM)), index, mine)
        finally:
            busy.clear()

    busy = []
    return module.register_forward_hook(after, with_kwargs=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_gets_other_values_and_nothing_else_changes(family):
    """In every implementation; an edit that changes nothing gives the same bits through the same mode."""
    engine, batch, _, _ = engine_of(family)
    modules, layers = modules_of(engine), engine.anatomy.moe_layers
    for implementation in IMPLEMENTATIONS if family != "Llama4" else ("eager",):
        engine.model.set_experts_implementation(implementation)
        untouched = engine.forward(batch)
        engine.mapped = dict.fromkeys(layers, 1)
        same = engine.run(Change("identity", "identity", ("mlp_in",), layers), batch, None, None)
        assert torch.equal(same, untouched)
        moved = []
        for layer, expert in ((layers[0], 1), (layers[-1], 3), (layers[-1], 0)):
            change = Change("", "map", ("mlp_in",), (layer,), format=FORM, experts=((layer, expert),))
            found = engine.run(change, batch, None, None)
            hook = alone(modules[layer], expert)
            wanted = engine.forward(batch)
            hook.remove()
            real = torch.tensor([[place < length for place in range(12)] for length in batch.lengths])
            torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)
            moved.append(not torch.allclose(found[real], untouched[real], rtol=1e-3, atol=1e-4))
        assert any(moved)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules.values())
    assert torch._C._len_torch_function_stack() == 0


def test_an_expert_whose_rows_are_not_found_is_refused(monkeypatch):
    engine, batch, _, _ = engine_of("Mixtral")
    engine.model.set_experts_implementation("eager")
    layer = engine.anatomy.moe_layers[0]
    change = Change("", "map", ("mlp_in",), (layer,), format=FORM, experts=((layer, 1),))
    experts = modules_of(engine)[layer]
    real = type(experts).forward
    for wrong, said in (
        (lambda self, x, index, weights: real(self, x + 1, index, weights), "gets other rows than the module does"),
        (lambda self, x, index, weights: torch.zeros_like(x), "0 of the rows of its"),
    ):
        monkeypatch.setattr(type(experts), "forward", wrong)
        with pytest.raises(SiteError, match=said):
            engine.run(change, batch, None, None)
        assert torch._C._len_torch_function_stack() == 0


def by_loop(oracle, layer, expert, form):
    """A hook that computes the experts of a layer token by token; the values that one expert gets are rounded."""

    def after(experts, args, _output):
        hidden, index, weights = args
        rounded = emulate(hidden, form)
        found = torch.zeros_like(hidden)
        for token, (chosen, factors) in enumerate(zip(index.tolist(), weights, strict=True)):
            for number, factor in sorted(zip(chosen, factors, strict=True)):
                x = rounded[token] if number == expert else hidden[token]
                gate, up = (experts.gate_up_proj[number] @ x).chunk(2)
                found[token] += factor * (experts.down_proj[number] @ (torch.nn.functional.silu(gate) * up))
        return found

    return oracle.model.model.layers[layer].mlp.experts.register_forward_hook(after)


def test_every_number_of_a_map_over_experts(world):  # noqa: F811
    """Perplexity, KL, agreement and tokens of each expert of one layer, and of one of another, against loops over tokens."""
    workspace = world[0]
    study = study_of(world, {"map": "int8_token", "map_experts": ("2", "1.3")})
    probe(study, workspace, Silent())
    found, rows = numbers_of(study, workspace)
    assert found.gates.identity.value == 0 and found.gates.reference.value == 0
    mapped = [change for change in found.changes if change.experts]
    oracle = Experts(study, workspace)
    untouched, reached = oracle.logits(), {}
    for name in ("1.3", "2.0", "2.1", "2.2", "2.3"):
        reached[name] = oracle.tokens(name)
    assert [change.experts for change in mapped] == [[name] for name, tokens in reached.items() if tokens]
    for change in mapped:
        (name,) = change.experts
        layer, expert = map(int, name.split("."))
        assert (change.kind, change.group, change.sites, change.layers) == ("map", "int8_token", ["mlp_in"], [layer])
        assert change.name == f"map int8_token expert {name}" and change.expert_tokens == [reached[name]]
        handle = by_loop(oracle, layer, expert, parse_format("int8_token"))
        logits = oracle.logits()
        handle.remove()
        assert_same(change, measures(untouched, logits, oracle.ids), tolerance=2e-3)
    assert {(row["site"], row["layer"]) for row in rows} == {(s, n) for s in ("attn_in", "mlp_in") for n in range(3)}
    assert any("of an expert of the map" in note for note in found.notes)
    assert draw_expert_map(found).name == "expert_map.png"
    content = json.loads((probe_folder(study, workspace) / "numbers" / "probes.json").read_bytes())
    assert len(content["changes"]) <= count_passes(study.spec, 3, has_experts=True, experts=4)


def test_an_expert_without_a_token_is_unknown(world, monkeypatch):  # noqa: F811
    study = study_of(world, {"map": "int8_token", "map_experts": ("1",)}, label="unreached")
    real = run.expert_load
    monkeypatch.setattr(run, "expert_load", lambda *a: {k: v * (np.arange(v.size) != 2) for k, v in real(*a).items()})
    probe(study, world[0], Silent())
    found, _ = numbers_of(study, world[0])
    assert [c.experts for c in found.changes if c.experts] == [["1.0"], ["1.1"], ["1.3"]]
    assert any("no token of the probe reaches expert 1.2" in note for note in found.notes)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"map_experts": ("1.0",)}, "the format is that of the map: give --map"),
        ({"map": "int8_token", "map_experts": ("1.4",)}, "--map-experts 1.4: each layer of .* has the experts 0 to 3"),
        ({"map": "int8_token", "map_experts": ("3",)}, "--map-experts 3: layer 3 is not one of the study's layers"),
        (
            {"map": "int8_token", "map_experts": ("all",)},
            "12 experts of 3 layers are as many passes .* at most 5 are made",
        ),
    ],
)
def test_a_map_that_cannot_be_made_is_refused_before_a_model_is_loaded(world, monkeypatch, asked, said):  # noqa: F811
    monkeypatch.setattr(run, "load_model", lambda *_args, **_options: pytest.fail("a model was loaded"))
    monkeypatch.setattr(expert_choice, "MOST_MAPPED", 5)
    with pytest.raises(BadInput, match=said):
        probe(study_of(world, asked, label="refused"), world[0], Silent())


def test_a_dense_model_and_a_study_without_mlp_in_have_no_map_over_experts(workspace, llama, text, world):  # noqa: F811
    asked = {"map": "int8_token", "map_experts": ("all",)}
    with pytest.raises(BadInput, match="is a dense model and has no experts"):
        probe(prepared(workspace, llama, text, capture=CAPTURE, probe=asked), workspace, Silent())
    with pytest.raises(BadInput, match="did not capture mlp_in"):
        probe(study_of(world, asked, capture={"sites": ("attn_in",)}), world[0], Silent())


def test_names_ids_and_passes(world):  # noqa: F811
    plain = study_of(world, {"map": "int8_token"})
    one = study_of(world, {"map": "int8_token", "map_experts": ("01.2", "1.02", "all")})
    assert one.spec.probe.map_experts == ("1.2", "all") and probe_id(one) != probe_id(plain)
    assert len(mapped_experts(one)) == 12 and mapped_experts(plain) == ()
    assert count_passes(one.spec, 3, has_experts=True, experts=4) == count_passes(plain.spec, 3, has_experts=True) + 6
    some = study_of(world, {"map": "int8_token", "map_experts": ("1", "0.3")})
    assert count_passes(some.spec, 3, has_experts=True, experts=4) == count_passes(plain.spec, 3, has_experts=True) + 5
    assert mapped_experts(some) == ((0, 3), (1, 0), (1, 1), (1, 2), (1, 3))
    for name in ("super", "1.x", "-1", "1.2.3"):
        with pytest.raises(ValidationError, match=r"is not LAYER\.EXPERT such as 1\.68, LAYER such as 1, or all"):
            study_of(world, {"map": "int8_token", "map_experts": (name,)})


def test_the_verdict_and_the_page_name_the_costliest_experts_and_hide_no_format():
    """A map of experts counts as a trial of no format, and what can't be told from rounding is not named."""
    some = [
        probed.change(
            f"map int8_token expert 1.{n}", "map", kl, format="int8_token", sites=["mlp_in"], layers=[1]
        ).model_copy(update={"experts": [f"1.{n}"], "expert_tokens": [n + 1], "distinguishable": kl > 0.0002})
        for n, kl in enumerate((0.004, 0.02, 0.0001, 0.0, 0.003))
    ]
    made = probed.probes(*some)
    advice = advise(made, [], 0.05)
    assert advice.formats == []
    wanted = (
        "int8_token at the input of one expert alone costs most at 1.1 (KL 0.02, 2 tokens), 1.0 (KL 0.004, 1 tokens)"
    )
    assert wanted in advice.paragraph and "2 of 5 can't be told from rounding" in advice.paragraph
    assert "expert 1.1" in draw_expert_map(made).alt and "Bars of 4 experts" in draw_expert_map(made).alt
    page = make_probe_page(made, [], advice).decode()
    assert "KL where what one expert gets is quantized" in page and "map int8_token expert 1.4" in page
    assert draw_expert_map(probed.probes()) is None
    flat = probed.probes(some[3])
    assert (
        draw_expert_map(flat) is None and "can't be told from rounding at any of 1" in advise(flat, [], 0.05).paragraph
    )
    assert check_probes(json_bytes(made.model_dump(mode="json"))) == made
