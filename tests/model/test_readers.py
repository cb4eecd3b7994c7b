"""Readers of sites: every module with a weight is named, and receives what its site gives, in every family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from outliers.errors import BadInput
from outliers.model.anatomy import Anatomy
from outliers.model.families import INPUT
from outliers.model.readers import HEAD, TRANSPOSED, find_readers
from outliers.model.sites import study_anatomy
from outliers.model.source import find_model
from outliers.spec import ModelSpec
from tests.support import tiny


def made(family, **changes):
    torch.manual_seed(0)
    kind, values = tiny.CONFIGS[family]
    config = getattr(transformers, f"{kind}Config")(**(values | changes))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), config


def described(model, config, tmp_path, workspace):
    """What `find_readers` reads of a model's description; the config is on disk."""
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path / "model")
    tiny.save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").touch()
    source = find_model(ModelSpec(id=str(tmp_path / "model")), workspace, weights=False)
    anatomy = study_anatomy(model, config.get_text_config())
    return SimpleNamespace(architecture=type(model).__name__, num_layers=3, anatomy=anatomy, source=source)


def weighted(model, prefix):
    """Names of the modules below a path that have a matrix of their own; convolutions read no site."""
    return {
        name
        for name, module in model.named_modules()
        if name.startswith(prefix)
        and "Conv1d" not in type(module).__name__
        and any(p.dim() >= 2 for p in module.parameters(recurse=False))
    }


def tensors(model, anatomy: Anatomy, ids):
    """What each site gives in each layer, and what each module is called with, of one forward pass; rows of features."""
    sites, inputs = {}, {}
    base = model.get_submodule(anatomy.backbone)

    def keep(into, key):
        def hook(_module, args, kwargs, out=None):
            value = out if out is not None else args[0] if args else kwargs["hidden_states"]
            value = value[0] if isinstance(value, tuple) else value
            into[key] = value.detach().clone().reshape(-1, value.shape[-1])

        return hook

    for site in anatomy.sites:
        for layer, path in enumerate(anatomy.sites[site]):
            if path.endswith(INPUT):
                module = base.get_submodule(path.removesuffix(INPUT))
                module.register_forward_pre_hook(keep(sites, (site, layer)), with_kwargs=True)
            elif path:
                base.get_submodule(path).register_forward_hook(keep(sites, (site, layer)), with_kwargs=True)
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(keep(inputs, name), with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=ids)
    return sites, inputs


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_every_module_with_a_weight_is_a_reader_and_receives_its_site(tmp_path, workspace, family):
    model, config = made(family)
    info = described(model, config, tmp_path, workspace)
    readers = find_readers(info, workspace)
    assert [r.name for r in readers] == list(dict.fromkeys(r.name for r in readers))
    assert {r.name for r in readers} == weighted(model, f"{info.anatomy.backbone}.{info.anatomy.layers}.")
    assert HEAD in dict(model.named_modules())
    linear = {type(model.get_submodule(r.name)).__name__ for r in readers if r.kind == "projection"}
    assert (linear == {"Conv1D"}) == (info.architecture in TRANSPOSED)
    sites, inputs = tensors(model, info.anatomy, torch.arange(40).reshape(2, 20))
    seen = set()
    for reader in readers:
        if reader.site is None or (reader.kind == "experts" and family == "Llama4"):  # those get hidden x score
            continue
        torch.testing.assert_close(inputs[reader.name], sites[reader.site, reader.layer], rtol=0, atol=0)
        seen.add((reader.site, reader.layer))
    assert seen == {key for key in sites if key[0] != "resid"}


def test_a_latent_attention_without_the_narrow_projection_of_queries(tmp_path, workspace):
    model, config = made("DeepseekV3", q_lora_rank=None)
    info = described(model, config, tmp_path, workspace)
    readers = find_readers(info, workspace)
    assert {r.name for r in readers} == weighted(model, "model.layers.")
    assert "model.layers.0.self_attn.q_proj" in {r.name for r in readers if r.site == "attn_in"}


def test_a_family_that_is_not_in_the_table_is_refused(workspace):
    with pytest.raises(BadInput, match="modules of StarForCausalLM read a site is not known"):
        find_readers(SimpleNamespace(architecture="StarForCausalLM"), workspace)
