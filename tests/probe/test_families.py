"""Every family: a change at the readers is the change at the site itself, made by hooks of this file; or it is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from outliers.errors import SiteError
from outliers.model.families import INPUT
from outliers.model.sites import study_anatomy
from outliers.probe.edits import Identity, Mean, Zero, edited
from outliers.probe.engine import Batch, Engine
from outliers.probe.measure import compare
from outliers.probe.readers import find_readers
from outliers.probe.sharing import Kept
from tests.support import tiny

FEATURES = (3, 7)
SITES = ("attn_in", "mlp_in", "o_in", "down_in")
NORM_IS_RESIDUAL = {("OPT, post-norm", "mlp_in")}
"""The norm before the MLP gives the residual stream too: a change of its output is another change, and the readers are right."""


def model_of(family):
    torch.manual_seed(0)
    kind, values = tiny.CONFIGS[family]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**values)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                weight += 0.1 * torch.randn_like(weight)
    return model


def engine_of(family):
    model = model_of(family)
    anatomy = study_anatomy(model, model.config.get_text_config())
    layers = tuple(range(model.config.get_text_config().num_hidden_layers))
    there = tuple(
        s for s in SITES if s in anatomy.sites and s in anatomy.widths and len(anatomy.layers_of(s)) == len(layers)
    )
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    readers = find_readers(model.get_submodule(anatomy.backbone), anatomy, there, layers, ids)
    return Engine(model, anatomy, readers), Batch(range(2), ids, (12, 12), 2), there, layers


def by_site(engine, batch, site, layers, change):
    """The last hidden state with the change made at the site's own module, in all layers."""
    handles = []
    for layer in layers:
        path = engine.anatomy.sites[site][layer]
        module = engine.base.get_submodule(path.removesuffix(INPUT))
        if path.endswith(INPUT):

            def before(_module, args, kwargs):
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, out: change(out)))
    try:
        with torch.inference_mode():
            return engine.base(input_ids=batch.ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()


def zeroed(x):
    changed = x.clone()
    for feature in FEATURES:
        changed[..., feature] = 0
    return changed


def replaced(x):
    changed = x.clone()
    for feature, mean in zip(FEATURES, (0.25, -1.75), strict=True):
        changed[..., feature] = mean
    return changed


def by_readers(engine, batch, edits):
    with edited(engine.readers, edits, engine.now):
        return engine.forward(batch)


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_a_change_at_the_readers_is_the_change_at_the_site(family):
    engine, batch, there, layers = engine_of(family)
    untouched = engine.forward(batch)
    for site in there:
        own = engine.anatomy.alias_of(site) or site
        own = own if own in there else site
        assert all(engine.readers[own, layer] for layer in layers)
        places = [(own, layer) for layer in layers]
        zero = by_readers(engine, batch, dict.fromkeys(places, Zero(FEATURES)))
        mean = by_readers(engine, batch, dict.fromkeys(places, Mean(FEATURES, (0.25, -1.75))))
        assert not torch.equal(zero, untouched) and not torch.equal(mean, zero)
        if (family, site) in NORM_IS_RESIDUAL:
            assert not torch.equal(zero, by_site(engine, batch, site, layers, zeroed))
            continue
        assert torch.equal(zero, by_site(engine, batch, site, layers, zeroed)), site
        assert torch.equal(mean, by_site(engine, batch, site, layers, replaced)), site


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_layers_that_are_left_out_change_no_bit(family):
    engine, batch, _, _ = engine_of(family)
    kept = Kept(engine.layers, (0, 1))
    with kept.filling():
        untouched = engine.forward(batch)
    forwards = [layer.__dict__.get("forward") for layer in engine.layers]
    for first in (1, 2):
        places = [place for place in engine.readers if place[1] >= first]
        for edit in (Identity(), Zero(FEATURES)):
            whole = by_readers(engine, batch, dict.fromkeys(places, edit))
            with kept.skipping(first):
                shared = by_readers(engine, batch, dict.fromkeys(places, edit))
            assert torch.equal(shared, whole)
            assert torch.equal(whole, untouched) == isinstance(edit, Identity)
    assert [layer.__dict__.get("forward") for layer in engine.layers] == forwards


@pytest.mark.parametrize(
    "family", [name for name in tiny.CONFIGS if "oe" in name or name in ("Mixtral", "GptOss", "Llama4", "DeepseekV3")]
)
def test_routers_and_gates_are_known_and_left_out_of_quantization(family):
    engine, _, _, _ = engine_of(family)
    for layer in engine.anatomy.moe_layers:
        readers = engine.readers["mlp_in", layer]
        routers = {reader.path.rpartition(".")[2] for reader in readers if reader.is_router}
        assert len([reader for reader in readers if reader.is_experts]) == 1
        assert routers in ({"gate"}, {"router"}, {"gate", "shared_expert_gate"}), routers
        for reader in readers:
            assert reader.is_router == (reader.path.rpartition(".")[2] in ("gate", "router", "shared_expert_gate"))


def test_a_site_whose_readers_are_not_found_is_refused():
    """Attention that copies what it receives: no module with weights has the site's tensor."""
    model = model_of("Llama")
    anatomy = study_anatomy(model, model.config)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"].clone()}),
            with_kwargs=True,
        )
    ids = torch.arange(12)[None]
    with pytest.raises(
        SiteError, match="no module of LlamaModel with weights receives the tensor of attn_in in layer 0"
    ):
        find_readers(model.model, anatomy, ("attn_in",), (0, 1, 2), ids)


def test_experts_that_receive_another_tensor_are_refused():
    model = model_of("Mixtral")
    anatomy = study_anatomy(model, model.config)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: (args[0] * 1.5, *args[1:]))
        # the hook of the search comes after it, and sees what the experts really get
    with pytest.raises(SiteError, match="receive another tensor than mlp_in"):
        find_readers(model.model, anatomy, ("mlp_in",), (0, 1, 2), torch.arange(12)[None])


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_what_is_measured_is_what_whole_logits_give(family):
    """The head on slices against the model's own forward, caps and divisors included; one sequence is shorter."""
    engine, batch, _, _layers = engine_of(family)
    places = [place for place in engine.readers if place[0] in ("attn_in", "mlp_in")]
    lengths = (12, 9)
    untouched, changed = engine.forward(batch), by_readers(engine, batch, dict.fromkeys(places, Zero(FEATURES)))
    first, (second,) = compare(engine.head, untouched, [changed], batch.ids, lengths)
    with torch.inference_mode():
        p = torch.log_softmax(engine.model(input_ids=batch.ids).logits.double(), -1)
        with edited(engine.readers, dict.fromkeys(places, Zero(FEATURES)), engine.now):
            q = torch.log_softmax(engine.model(input_ids=batch.ids).logits.double(), -1)
    for row, length in enumerate(lengths):
        at, targets = slice(0, length - 1), batch.ids[row, 1:length, None]
        for own, found in ((first[row], p), (second[row], q)):
            assert own.tokens == length - 1
            assert own.nll == pytest.approx(float(-found[row, at].gather(-1, targets).sum()), rel=1e-6)
            assert own.top1_probability == pytest.approx(float(found[row, at].exp().amax(-1).sum()), rel=1e-6)
            assert own.agreement == int((found[row, at].argmax(-1) == p[row, at].argmax(-1)).sum())
        kl = (p[row, at].exp() * (p[row, at] - q[row, at])).sum()
        assert second[row].kl == pytest.approx(float(kl), rel=1e-5, abs=1e-13) and first[row].kl == 0
