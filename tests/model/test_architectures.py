"""Every family: what is captured is what attention and MLP receive, bit for bit, found by other means than the table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.errors import BadInput, SiteError, UnknownArchitecture
from outliers.model.describe import describe_model
from outliers.model.families import FAMILIES
from outliers.model.source import find_model
from outliers.spec import ModelSpec, StudySpec
from outliers.store.chunks import Journal
from outliers.study.prepare import layout_of, prepare
from tests.support import tiny
from tests.support.captured import stored
from tests.support.synthetic import Silent

SITES = ("attn_in", "mlp_in", "o_in", "resid")
LAST = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")
"""What the second projection of an MLP is called in one family or another."""
ONE_NORM = ("Falcon", "GPTJ", "Phi")


def child(layer, *words):
    """The one direct child whose class is called like a role."""
    found = [part for _, part in layer.named_children() if type(part).__name__.endswith(words)]
    assert len(found) == 1, found
    return found[0]


def received(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def projection_of(layer):
    """Attention's output projection."""
    attention = child(layer, "Attention", "GatedDeltaNet")
    projections = [getattr(attention, name, None) for name in ("o_proj", "dense", "out_proj", "c_proj")]
    return next(p for p in projections if p is not None)


def independent(model, ids, step):
    """What attention, its projection and the MLP receive, and what a layer returns, of the whole model with its head."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    layers = next(m for m in lists if "Vision" not in type(m[0]).__name__ and "Siglip" not in type(m[0]).__name__)
    found = {site: [[] for _ in layers] for site in SITES}

    def on_input(module, site, index):
        def hook(_module, args, kwargs):
            found[site][index].append(received(args, kwargs).detach().clone())

        module.register_forward_pre_hook(hook, with_kwargs=True)

    for index, layer in enumerate(layers):
        attention = child(layer, "Attention", "GatedDeltaNet")
        on_input(attention, "attn_in", index)
        on_input(projection_of(layer), "o_in", index)
        on_input(
            layer.fc1 if hasattr(layer, "fc1") else child(layer, "MLP", "SparseMoeBlock", "TextMoe", "MoE"),
            "mlp_in",
            index,
        )
        last = [getattr(layer, "fc2", None), *(getattr(part, name, None) for part in layer.children() for name in LAST)]
        dense = "experts" not in {path.rpartition(".")[2] for path, _ in layer.named_modules()}
        outputs = [p for p in last if p is not None and p is not projection_of(layer)]
        if dense:
            assert len({id(p) for p in outputs}) == 1
            found.setdefault("down_in", {}).setdefault(index, [])
            on_input(outputs[0], "down_in", index)
        layer.register_forward_hook(
            lambda _m, _a, out, at=index: found["resid"][at].append((out[0] if isinstance(out, tuple) else out).clone())
        )
    with torch.inference_mode():
        logits = [model(input_ids=ids[at : at + step]).logits.float() for at in range(0, len(ids), step)]
    count, positions = ids.shape
    dense = found.pop("down_in", {})  # of the layers without experts
    tensors = {
        site: torch.stack([torch.cat([t.reshape(-1, positions, t.shape[-1]) for t in layer]) for layer in layers_])
        for site, layers_ in found.items()
    }
    if dense:
        found_in = [torch.cat([t.reshape(-1, positions, t.shape[-1]) for t in dense[layer]]) for layer in sorted(dense)]
        tensors["down_in"] = torch.stack(found_in) if len({t.shape for t in found_in}) == 1 else found_in
    assert all(tensor.shape[1] == count for tensor in tensors.values())
    return tensors, torch.cat(logits)


def mean_loss(logits, ids):
    """Negative log-likelihood a token in nats, float64, by the definition."""
    logs = torch.log_softmax(logits.double(), dim=-1)[:, :-1]
    return -float(logs.gather(-1, ids[:, 1:, None]).mean())


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_every_family_gives_what_its_modules_receive(tmp_path, workspace, text, family):
    folder = tiny.make_model(tmp_path / "model", family, dtype="bfloat16")
    moe = describe_model(find_model(ModelSpec(id=folder), workspace), "auto", workspace).anatomy.moe_layers
    sites = SITES if moe else (*SITES, "down_in")
    spec = tiny.spec_for(folder, text, sequences=3, capture={"sites": sites, "batch_sequences": 2, "perplexity": True})
    study = prepare(StudySpec.model_validate(spec), workspace)
    extract(study, workspace, Silent())
    ids = torch.from_numpy(load_corpus(study.corpus, workspace).token_ids.astype(np.int64))
    tensors, logits = independent(load_model(study.model, workspace, "cpu"), ids, step=2)
    assert moe or "down_in" in tensors
    for site in sites:
        tensor = tensors[site]
        np.testing.assert_array_equal(stored(workspace, study, site), tensor.float().numpy(), err_msg=site)
    alias = layout_of(study.spec, study.model).aliases
    assert alias == ({"mlp_in": "attn_in"} if family in ONE_NORM else {})
    # perplexity of the same pass; the head's rounding differs a little between slices and whole sequences
    entries = Journal.open(workspace.capture(study.capture_id) / "journal.jsonl").done.values()
    loss = sum(e["nll"] for e in entries) / sum(e["nll_tokens"] for e in entries)
    assert loss == pytest.approx(mean_loss(logits, ids), rel=2e-3)
    assert sum(e["nll_tokens"] for e in entries) == 3 * 23


@pytest.mark.parametrize(
    "family", [name for name in sorted(tiny.CONFIGS) if "Qwen3Moe, one dense" in name or "Llama4" in name]
)
def test_down_in_of_the_dense_layers_of_a_mixed_model(tmp_path, workspace, text, family):
    folder = tiny.make_model(tmp_path / "model", family, dtype="bfloat16")
    info = describe_model(find_model(ModelSpec(id=folder), workspace), "auto", workspace)
    dense = tuple(layer for layer in range(info.num_layers) if layer not in info.anatomy.moe_layers)
    assert info.anatomy.layers_of("down_in") == dense
    spec = tiny.spec_for(folder, text, sequences=2, capture={"sites": ("down_in",)})
    with pytest.raises(BadInput, match="read the layers that have it with --layers " + ",".join(map(str, dense))):
        prepare(StudySpec.model_validate(spec), workspace)
    spec["capture"]["layers"] = dense
    study = prepare(StudySpec.model_validate(spec), workspace)
    extract(study, workspace, Silent())
    ids = torch.from_numpy(load_corpus(study.corpus, workspace).token_ids.astype(np.int64))
    tensors, _ = independent(load_model(study.model, workspace, "cpu"), ids, step=1)
    np.testing.assert_array_equal(stored(workspace, study, "down_in"), tensors["down_in"].float().numpy())


def test_down_in_of_a_model_of_experts_alone_is_refused(tmp_path, workspace, text):
    folder = tiny.make_model(tmp_path / "model", "Mixtral")
    spec = tiny.spec_for(folder, text, capture={"sites": ("down_in",)})
    with pytest.raises(BadInput, match="is in no layer, for each has experts"):
        prepare(StudySpec.model_validate(spec), workspace)


def test_the_families_tried_are_the_table():
    tried = set()
    for kind, values in tiny.CONFIGS.values():
        config = getattr(transformers, f"{kind}Config")(**values)
        with torch.device("meta"):
            tried.add(type(transformers.AutoModelForCausalLM.from_config(config)).__name__)
    assert tried == set(FAMILIES)


def anatomy(tmp_path, workspace, family, **changes):
    folder = tiny.make_model(tmp_path / "model", family, **changes)
    return describe_model(find_model(ModelSpec(id=folder), workspace), "auto", workspace)


def test_dense_and_moe_layers_routers_and_experts(tmp_path, workspace):
    mixed = anatomy(tmp_path, workspace, "Qwen3Moe, one dense")
    assert mixed.anatomy.moe_layers == (0, 2)
    assert (mixed.anatomy.router, mixed.anatomy.experts) == ("layers.*.mlp.gate", "layers.*.mlp.experts")
    assert (mixed.num_experts, mixed.experts_per_token) == (4, 2)
    llama = anatomy(tmp_path, workspace, "Llama4")
    assert llama.anatomy.moe_layers == (1,)
    assert llama.anatomy.router == "layers.*.feed_forward.router"
    dense = anatomy(tmp_path, workspace, "Gemma2")
    assert (dense.anatomy.moe_layers, dense.anatomy.router, dense.num_experts) == ((), None, None)
    assert dense.anatomy.pattern("mlp_in") == "layers.*.pre_feedforward_layernorm"


def test_attention_of_two_kinds_and_widths(tmp_path, workspace):
    info = anatomy(tmp_path, workspace, "Qwen3Next")
    assert info.anatomy.pattern("o_in") == "layers.*.linear_attn.out_proj:input | layers.*.self_attn.o_proj:input"
    assert anatomy(tmp_path, workspace, "DeepseekV3").anatomy.widths["o_in"] == 48
    uneven = tiny.make_model(tmp_path / "uneven", "Qwen3Next", head_dim=16)
    spec = tiny.spec_for(uneven, "builtin:python-docs", capture={"sites": SITES})
    with pytest.raises(BadInput, match="the site o_in of uneven has another width in some layers"):
        prepare(StudySpec.model_validate(spec), workspace)


def starcoder(tmp_path):
    """A family that the table does not have."""
    torch.manual_seed(0)
    config = transformers.Starcoder2Config(**tiny.COMMON)
    folder = tmp_path / "starcoder"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return str(folder)


def test_an_unknown_family_lists_its_candidates_and_can_be_named(tmp_path, workspace, text):
    folder = starcoder(tmp_path)
    with pytest.raises(UnknownArchitecture) as refused:
        prepare(StudySpec.model_validate(tiny.spec_for(folder, text)), workspace)
    for part in ("Starcoder2ForCausalLM", "--site-module attn_in=layers.*", "input_layernorm (LayerNorm)", "mlp ("):
        assert part in str(refused.value)
    named = ("attn_in=layers.*.input_layernorm", "mlp_in=layers.*.mlp:input")
    spec = StudySpec.model_validate(tiny.spec_for(folder, text, capture={"site_modules": named}))
    study = prepare(spec, workspace)
    extract(study, workspace, Silent())
    ids = torch.from_numpy(load_corpus(study.corpus, workspace).token_ids.astype(np.int64))
    tensors, _ = independent(load_model(study.model, workspace, "cpu"), ids, step=1)
    for site in ("attn_in", "mlp_in"):
        np.testing.assert_array_equal(stored(workspace, study, site), tensors[site].numpy(), err_msg=site)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("attn_in=layers.*.nothing", "3 of 3 modules are not there, first layers.0.nothing"),
        ("attn_in=layers.0.input_layernorm", "is not SITE=PATTERN"),
        ("attention=layers.*.input_layernorm", "SITE one of attn_in, mlp_in, o_in, down_in, resid"),
        ("attn_in=layers.*.input_layernorm", "the site mlp_in of Starcoder2ForCausalLM is not known"),
    ],
)
def test_names_that_name_nothing(tmp_path, workspace, text, named, message):
    spec = tiny.spec_for(starcoder(tmp_path), text, capture={"site_modules": (named,)})
    with pytest.raises(BadInput) as refused:
        prepare(StudySpec.model_validate(spec), workspace)
    assert message in str(refused.value)


def test_a_named_module_changes_the_capture_and_an_own_name_does_not(tmp_path, workspace, text):
    folder = tiny.make_model(tmp_path / "model")

    def capture_id(*named):
        spec = tiny.spec_for(folder, text, capture={"site_modules": named})
        return prepare(StudySpec.model_validate(spec), workspace).capture_id

    assert capture_id() == capture_id("attn_in=layers.*.input_layernorm")
    assert capture_id() != capture_id("attn_in=layers.*.self_attn:input")


def test_a_module_that_gives_something_else_is_refused(tmp_path, workspace, text):
    folder = tiny.make_model(tmp_path / "model")
    spec = tiny.spec_for(folder, text, capture={"site_modules": ("mlp_in=layers.*.mlp.gate_proj",)})
    with pytest.raises(SiteError, match=r"gave \(1, 24, 48\), the site mlp_in needs \(1, 24, 32\)"):
        extract(prepare(StudySpec.model_validate(spec), workspace), workspace, Silent())


def test_perplexity_alone_is_added_to_a_finished_capture(tmp_path, workspace, text):
    """Asked later, it takes a pass of its own and writes no activation; asked at once, it costs none."""
    folder = tiny.make_model(tmp_path / "model")
    without = prepare(StudySpec.model_validate(tiny.spec_for(folder, text)), workspace)
    extract(without, workspace, Silent())
    root = workspace.capture(without.capture_id)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("c.*")}
    asked = tiny.spec_for(folder, text, capture={"perplexity": True})
    study = prepare(StudySpec.model_validate(asked), workspace)
    assert study.capture_id == without.capture_id
    assert study.study_id != without.study_id
    assert extract(study, workspace, Silent())["sequences"] == 4
    assert {path: path.stat().st_mtime_ns for path in root.rglob("c.*")} == before
    later = {n: e["nll"] for n, e in Journal.open(root / "journal.jsonl").done.items()}
    assert extract(study, workspace, Silent())["sequences"] == 0
    import shutil

    shutil.rmtree(root)
    extract(study, workspace, Silent())
    assert {n: e["nll"] for n, e in Journal.open(root / "journal.jsonl").done.items()} == later
    assert all(math.isfinite(value) for value in later.values())
