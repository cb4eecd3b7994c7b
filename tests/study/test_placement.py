"""Parts of a model on GPUs: against every way to cut, and against the libraries that read the map."""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction

import pytest
import torch
import transformers
from accelerate.utils.modeling import check_device_map
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import expand_device_map

from outliers.errors import PlanRefused
from outliers.model.weights import weigh
from outliers.study.placement import CONTEXT_BYTES, budgets, device_map, even, fit, place, total_needed, usable
from tests.model.test_weights import empty, layers_path

GB = 1_000_000_000


def every_way(parts, room):
    """Fullness of the fullest GPU in each way to cut `parts` into runs that fit. Brute force."""
    for cuts in itertools.combinations_with_replacement(range(len(parts) + 1), len(room) - 1):
        edges = (0, *cuts, len(parts))
        held = [sum(parts[a:b]) for a, b in itertools.pairwise(edges)]
        if all(h <= r for h, r in zip(held, room, strict=True)):
            yield max(Fraction(h, r) if h else Fraction(0) for h, r in zip(held, room, strict=True))


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=7).map(tuple),
    st.lists(st.integers(0, 50), min_size=1, max_size=4).map(tuple),
)
def test_the_fullest_gpu_is_as_empty_as_it_can_be(parts, room):
    ways = list(every_way(parts, room))
    placed = place(parts, room)
    assert (placed is None) == (not ways)
    if placed is not None:
        assert len(placed) == len(parts)
        assert list(placed) == sorted(placed), "a part never comes before one on an earlier GPU"
        held = [sum(p for p, gpu in zip(parts, placed, strict=True) if gpu == n) for n in range(len(room))]
        assert all(h <= r for h, r in zip(held, room, strict=True))
        assert max(Fraction(h, r) if h else Fraction(0) for h, r in zip(held, room, strict=True)) == min(ways)


@given(st.integers(0, 10**12))
def test_usable_and_needed_are_each_others_way_back(size):
    needed = total_needed(size)
    assert usable(needed) >= size
    assert usable(needed - 1) < size or size == 0


def test_budgets_come_from_each_device_and_never_from_a_constant():
    small, large = budgets((24 * GB, 80 * GB), 2 * GB)
    assert (small, large) == (24 * GB * 95 // 100 - 3 * GB, 80 * GB * 95 // 100 - 3 * GB)
    assert budgets((CONTEXT_BYTES, 0), 5) == (0, 0)


PARTS = (1 * GB, *[2 * GB] * 30, 1 * GB)  # 62 GB

# (GPUs as found, at most, devices of embedding, some layers, rest)
FITS = [
    ((80 * GB,), None, {0: 0, 15: 0, 31: 0}, (0,)),
    # one of the four is enough, the first of equal ones
    ((80 * GB,) * 4, None, {0: 0, 31: 0}, (0,)),
    # one is enough, and it is the larger
    ((24 * GB, 80 * GB), None, {0: 1, 31: 1}, (1,)),
    # two, evenly: 31 GB each
    ((40 * GB, 40 * GB), 2, {0: 0, 15: 0, 16: 1, 31: 1}, (0, 1)),
    # two of four; the smaller ones are left alone
    ((24 * GB, 40 * GB, 24 * GB, 40 * GB), None, {0: 1, 15: 1, 16: 3, 31: 3}, (1, 3)),
    # one whose driver doesn't tell its memory is taken to be large enough
    ((0,), None, {0: 0, 31: 0}, (0,)),
    # the filter left the first out
    ((None, 80 * GB), None, {0: 1, 31: 1}, (1,)),
]


@pytest.mark.parametrize(("found", "most", "devices", "gpus"), FITS)
def test_as_few_gpus_as_fit_are_used_evenly(found, most, devices, gpus):
    placed = fit(PARTS, found, GB, most)
    assert placed.gpus == gpus
    assert {part: placed.devices[part] for part in devices} == devices
    assert sum(map(placed.weight_bytes, placed.gpus)) == 62 * GB


def test_a_person_reads_which_layers_are_where():
    assert fit(PARTS, (40 * GB, 40 * GB), GB, None).sentence == (
        "split over 2 GPUs: layers 0-14 on GPU 0, layers 15-29 on GPU 1"
    )
    assert fit(PARTS, (80 * GB,) * 2, GB, None).sentence == "one GPU is used (GPU 0)"
    three = even((9, 1, 2), 3, 0)
    assert [three.layers(gpu) for gpu in three.gpus] == ["none", "0"]


# what is needed, and what there is, stand in each refusal
REFUSED = [
    ((40 * GB,), None, r"needs 63\.0 GB on one GPU, the largest has 40\.0 GB \(37\.0 GB usable"),
    ((24 * GB, 40 * GB), 1, r"needs 63\.0 GB on one GPU, the largest has 40\.0 GB"),
    ((24 * GB,) * 2, None, r"need 64\.0 GB over 2 GPUs of 24 GB \(43\.6 GB usable\)"),
    ((None, None), None, "no GPU may be used"),
]


@pytest.mark.parametrize(("found", "most", "message"), REFUSED)
def test_too_small_gpus_are_refused_with_both_numbers(found, most, message):
    with pytest.raises(PlanRefused, match=message):
        fit(PARTS, found, GB, most)


def test_parts_that_can_not_be_cut_well_are_refused_with_both_numbers():
    with pytest.raises(PlanRefused, match=r"need 31\.0 GB on one of 2 GPUs of 32 GB \(29\.4 GB usable\)"):
        fit((10 * GB, 20 * GB, 10 * GB), (32 * GB,) * 2, GB, None)


def test_numbers_that_are_near_are_told_apart():
    with pytest.raises(
        PlanRefused, match=r"needs 10\.0010 GB on one GPU, the largest has 11\.5796 GB \(10\.0006 GB usable"
    ):
        fit((10 * GB,), (11_579_600_000,), 1_000_000, None)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, num_hidden_layers=12),
    "tied": transformers.LlamaConfig(**SMALL, num_hidden_layers=3, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=260),
    "opt": transformers.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=260),
    "neox": transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=260
    ),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=260),
    "falcon": transformers.FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=260),
    "mixtral": transformers.MixtralConfig(**SMALL, num_hidden_layers=3, num_local_experts=4),
    "gpt-oss": transformers.GptOssConfig(**SMALL, num_hidden_layers=2, num_local_experts=4, head_dim=8),
    "multimodal": transformers.Gemma3Config(
        text_config={**SMALL, "num_hidden_layers": 3, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4
    ),
}  # fmt: skip


def mapped(model, devices=2):
    """A device map of `model` over that many GPUs, and the placement it is made of."""
    path = layers_path(model)
    weights = weigh(model, path, "float32", None, None)
    placed = even(weights.parts, devices, 0)
    assert len(placed.gpus) == devices
    return path, placed, device_map(weights.embedding_modules, path, weights.rest_modules, placed.devices)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_map_covers_every_module_of_a_family(family):
    model = empty(FAMILIES[family], "float32")
    path, placed, where = mapped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # accelerate only warns of a name that is not a module
        check_device_map(model, where)
    names = [name for name, _ in model.named_parameters()]
    found = expand_device_map(where, names)
    held = dict.fromkeys(placed.gpus, 0)
    for name, parameter in model.named_parameters():
        if name.startswith(f"{path}."):
            layer = int(name.removeprefix(f"{path}.").split(".")[0])
            assert found[name] == placed.devices[1 + layer], "layers.1 is not layers.11"
        held[found[name]] += parameter.numel() * 4
    assert held == {gpu: placed.weight_bytes(gpu) for gpu in placed.gpus}
    assert found[next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)] == 0


@pytest.mark.parametrize("family", ["tied", "gpt2", "mixtral", "multimodal"])
def test_a_model_is_loaded_by_the_map(tmp_path, family):
    """By transformers itself. There is no GPU here: the second GPU is the processor too, and everything must be loaded."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    model.save_pretrained(tmp_path)
    where = mapped(model)[-1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=dict.fromkeys(where, "cpu")).eval()
    ids = torch.randint(0, 250, (1, 9))
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
