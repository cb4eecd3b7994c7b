"""Seconds and dollars of a study, against sums done by hand on the configs of two models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.hardware import GB, Facts, Gpu
from outliers.machines.base import Offer
from outliers.model.describe import describe_model
from outliers.model.source import find_model
from outliers.planning.estimate import estimate, find_card, left_out, over_budget, price_of, total_seconds
from outliers.spec import ModelSpec, StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import layout_of
from outliers.units import format_seconds
from outliers.workspace import open_workspace

CONFIGS = Path(__file__).parents[1] / "support" / "configs"
A100 = Gpu("A100-80GB", 85 * GB)


def offer(*gpus, provider="sky", price=1.29, cpus=8, ram=200):
    return Offer(provider, "a", Facts(cpus, 256 * GB, ram * GB, 1000 * GB, gpus, "3.11"), price)


def described(folder, workspace):
    """Of a folder with a config alone, as if it had come from the hub."""
    info = describe_model(find_model(ModelSpec(id=str(folder)), workspace, weights=False), "bfloat16", workspace)
    return info.model_copy(update={"source": info.source.model_copy(update={"kind": "hub", "path": "org/name"})})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def moe(place):
    """Qwen3-30B-A3B: 30,532,122,624 parameters, of which 3,353,032,704 are active; 61.06 GB."""
    (place / "moe").mkdir()
    shutil.copy(CONFIGS / "qwen3-30b-a3b.json", place / "moe/config.json")
    return described(place / "moe", open_workspace(place / "work"))


@pytest.fixture(scope="module")
def dense(place):
    """The shape of Llama 3 8B: 8,030,261,248 parameters; 16.06 GB."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    config.save_pretrained(place / "dense")
    return described(place / "dense", open_workspace(place / "work"))


def study(sequences, length, **more):
    return StudySpec.model_validate(
        {"model": "org/name", "corpus": {"num_sequences": sequences, "sequence_length": length}} | more
    )


def steps_of(spec, info, where, left=None, download=0):
    left = layout_of(spec, info).total_bytes if left is None else left
    return estimate(demand_of(spec, info), where, tuple(gpu.name for gpu in where.facts.gpus), left, download)


def seconds(steps):
    return {step.name: step.seconds for step in steps}


def text(steps, name):
    return next(step.assumption for step in steps if step.name == name)


def test_the_moe_on_a_rented_a100(moe):
    """4 x 2048 tokens, two sites of 48 layers, 2048 wide, two bytes, and 7,104 bytes a token of routing: 3.28 GB of capture."""
    steps = steps_of(study(4, 2048), moe, offer(A100))
    assert seconds(steps) == {
        "boot": 300,
        "deploy": 120,
        "download": 305.3,  # 61,064,245,248 / 200e6
        "load": 130.1,  # the same / 500e6, and 8
        "pass": 6.6,  # 3,279,462,416 / 500e6
        "analysis": 10.4,  # 3.28 s over 8 cores, and 10
    }
    assert total_seconds(steps) == 872.4
    assert price_of(steps, 1.29) == 0.3126
    # 8192 x (2 x 3,353,032,704 + 2 x 2048 x 4096 x 48) / (0.3 x 312e12) = 0.66, and 4 x 48 x 128 x 2 x 10 us = 0.49 for experts
    # that are multiplied one by one; 4 x 61.06e9 / 1935e9 = 0.13
    assert text(steps, "pass").startswith("decided by writing 3.28 GB")
    assert "8,192 tokens x 7.51 GFLOP" in text(steps, "pass")
    assert "12,288 products of single experts in each of 4 batches, 10 µs to start each, assumed: 1.1 s" in text(
        steps, "pass"
    )
    assert "reading 61.06 GB of weights for each of 4 batches at 1,935 GB/s: 0.1 s" in text(steps, "pass")


# (sequences, length, what decides, seconds) with one layer captured: 16,384 bytes a token
DENSE = [
    # 131,072 x (2 x 8,030,261,248 + 2 x 2048 x 4096 x 32) / 93.6e12; written in 4.3 s, read in 0.5 s
    (64, 2048, "131,072 tokens x 16.6 GFLOP", 23.2),
    # 1000 x 16,060,522,496 / 1935e9; computed in 5.5 s, written in 1.1 s
    (1000, 32, "reading 16.06 GB", 8.3),
]


@pytest.mark.parametrize(("sequences", "length", "decides", "expected"), DENSE)
def test_the_dense_model_on_an_a100(dense, sequences, length, decides, expected):
    steps = steps_of(study(sequences, length, capture={"layers": [0]}), dense, offer(A100))
    assert seconds(steps)["pass"] == expected
    assert text(steps, "pass").startswith(f"decided by {decides}")


def test_experts_in_one_kernel_start_nothing_one_by_one(moe):
    """From compute capability 9.0 on, where transformers takes torch's grouped_mm."""
    spec = study(64, 2048, capture={"layers": [0]})
    old, new = (steps_of(spec, moe, offer(Gpu(name, 85 * GB))) for name in ("A100", "H100"))
    assert "12,288 products of single experts in each of 64 batches" in text(old, "pass")
    assert "products" not in text(new, "pass")
    eager = moe.model_copy(update={"experts_implementation": "eager"})
    assert "12,288 products" in text(steps_of(spec, eager, offer(Gpu("H100", 85 * GB))), "pass")
    larger = steps_of(study(64, 2048, capture={"layers": [0], "batch_sequences": 4}), moe, offer(A100))
    # 131,072 tokens in 10.5 s by arithmetic, and 0.12288 s a batch
    assert seconds(old)["pass"] == pytest.approx(10.515 + 64 * 0.12288, abs=0.05)
    assert seconds(larger)["pass"] == pytest.approx(10.515 + 16 * 0.12288, abs=0.05)


def test_processes_side_by_side_share_the_batches_and_the_disk(dense):
    """65 sequences in batches of two are 33 batches: of two processes one has 17 of them, 34 sequences."""
    spec = study(65, 2048, capture={"layers": [0], "batch_sequences": 2})
    left = layout_of(spec, dense).total_bytes
    one, two, many = (
        estimate(demand_of(spec, dense), offer(*[A100] * n), (A100.name,), left, 0, n) for n in (1, 2, 33)
    )
    # tokens x (2 x 8,030,261,248 + 2 x 2048 x 4096 x 32) / 93.6e12
    flops = 2 * 8_030_261_248 + 2 * 2048 * 4096 * 32
    assert seconds(one)["pass"] == pytest.approx(65 * 2048 * flops / 93.6e12, abs=0.06)
    assert seconds(two)["pass"] == pytest.approx(34 * 2048 * flops / 93.6e12, abs=0.06)
    assert "2 processes side by side, 69,632 tokens" in text(two, "pass")
    assert seconds(many)["pass"] == round(left / 500e6, 1), "they write to one disk"
    assert seconds(many)["load"] - seconds(one)["load"] == pytest.approx(8 * (33 / 8 - 1), abs=0.2)
    assert "for 33 processes on 8 cores" in text(many, "load")


def test_two_gpus_work_one_after_the_other(moe):
    spec = study(64, 2048)
    assert seconds(steps_of(spec, moe, offer(A100, A100))) == seconds(steps_of(spec, moe, offer(A100)))
    mixed = steps_of(study(64, 2048, capture={"layers": [0]}), moe, offer(Gpu("H100", 85 * GB), Gpu("L4", 24 * GB)))
    assert "of the 121 of L4" in text(mixed, "pass")


def test_an_unknown_gpu_gets_no_number(dense):
    steps = steps_of(study(64, 2048), dense, offer(Gpu("NVIDIA Z9000", 80 * GB)))
    assert seconds(steps)["pass"] is None
    assert text(steps, "pass") == "the speed of NVIDIA Z9000 is not known, so no number is given"
    assert left_out(steps) == ("pass",)
    assert total_seconds(steps) == round(sum(s for s in seconds(steps).values() if s is not None), 1)


def test_this_machine_downloads_what_is_not_there_and_neither_boots_nor_deploys(dense):
    spec, here = study(4, 64), offer(provider="local", price=0.0)
    assert list(seconds(steps_of(spec, dense, here))) == ["load", "pass", "analysis"]
    half = steps_of(spec, dense, here, download=8 * GB)
    assert seconds(half)["download"] == 160  # 8e9 / 50e6
    assert "product of 768 x 768 matrices just reached here" in text(half, "pass")
    assert price_of(half, 0.0) == 0


def test_another_machine_gets_what_it_needs(dense):
    spec = study(4, 2048)
    own = steps_of(spec, dense, offer(provider="ssh", price=0.0))
    assert list(seconds(own)) == ["deploy", "download", "load", "pass", "analysis"]
    # 8192 x 16,597,393,408 / (8 x 20e9)
    assert seconds(own)["pass"] == 849.8
    assert "20 a core, assumed" in text(own, "pass")
    folder = dense.model_copy(update={"source": dense.source.model_copy(update={"kind": "folder"})})
    assert seconds(steps_of(spec, folder, offer(A100)))["upload"] == 1606.1  # 16.06e9 / 10e6
    assert "upload" not in seconds(steps_of(spec, folder, offer(A100, provider="local")))


def test_of_four_machines_each_does_the_longest_part(dense):
    """Ten sequences in four parts are 2, 3, 2 and 3: each is three tenths, but for what every machine does."""
    whole, spread = study(10, 2048), study(10, 2048, compute={"shards": 4, "provider": "sky"})
    part = study(3, 2048)
    left = layout_of(part, dense).total_bytes
    assert left * 10 == layout_of(whole, dense).total_bytes * 3
    each = steps_of(spread, dense, offer(A100), left)
    assert seconds(each) == seconds(steps_of(part, dense, offer(A100)))
    assert "6,144 tokens" in text(each, "pass")
    assert "3.22 GB at 1 s a gigabyte" in text(each, "analysis")
    assert price_of(each, 1.29, 4) == pytest.approx(4 * price_of(each, 1.29), abs=2e-4)
    # from here to all four goes one line
    folder = dense.model_copy(update={"source": dense.source.model_copy(update={"kind": "folder"})})
    up = steps_of(spread, folder, offer(A100), left)
    assert seconds(up)["upload"] == 6424.2  # 4 x 16.06e9 / 10e6
    assert "to each of 4" in text(up, "upload")


def test_processes_on_this_machine_do_all_of_it(dense):
    """They share cores and disk: nothing but the imports differs from one process."""
    one, eight = study(16, 64), study(16, 64, compute={"shards": 8})
    here = offer(provider="local", price=0.0, cpus=2)
    before, after = (seconds(steps_of(spec, dense, here)) for spec in (one, eight))
    assert after["load"] == before["load"] + 24  # 8 s of imports, four times
    assert after["analysis"] == before["analysis"]
    assert "1,024 tokens" in text(steps_of(eight, dense, here), "pass")


def test_a_capture_that_is_there_is_counted_alone_and_a_half_is_half(dense):
    spec = study(64, 2048)
    total = layout_of(spec, dense).total_bytes
    assert list(seconds(steps_of(spec, dense, offer(A100), left=0))) == ["boot", "deploy", "analysis"]
    whole, half = (seconds(steps_of(spec, dense, offer(A100), left=left)) for left in (total, total // 2))
    assert half["pass"] == pytest.approx(whole["pass"] / 2, abs=0.1)
    assert half["analysis"] == whole["analysis"]


def test_counting_is_bound_by_the_disk_where_memory_keeps_nothing(dense):
    spec = study(64, 2048)  # 68.7 GB
    assert seconds(steps_of(spec, dense, offer(A100, cpus=32)))["analysis"] == 12.1
    assert seconds(steps_of(spec, dense, offer(A100, cpus=32, ram=60)))["analysis"] == 147.4
    one = study(64, 2048, compute={"executor": "threads=1"})
    assert seconds(steps_of(one, dense, offer(A100)))["analysis"] == 78.7
    many = study(64, 2048, compute={"executor": "threads=64"})  # of more threads than cores the cores count
    assert seconds(steps_of(many, dense, offer(A100, cpus=32)))["analysis"] == 12.1
    dask = study(64, 2048, compute={"executor": "dask=tcp://10.0.0.5:8786"})
    assert left_out(steps_of(dask, dense, offer(A100))) == ("analysis",)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(2, 4000),
    st.integers(1, 1000),
    st.sampled_from([(A100,), (Gpu("L4", 24 * GB),) * 4, ()]),
    st.sampled_from(["moe", "dense"]),
)
def test_more_tokens_never_take_less(request_of, sequences, length, more, gpus, model):
    info, where = request_of[model], offer(*gpus, ram=2)

    def lasts(sequences, length):
        return seconds(steps_of(study(sequences, length), info, where))

    before = lasts(sequences, length)
    for after in (lasts(sequences + more, length), lasts(sequences, length + more)):
        assert all(after[name] >= before[name] for name in before)


@pytest.fixture(scope="module")
def request_of(moe, dense):
    return {"moe": moe, "dense": dense}


# (as a driver or a catalog spells it, bfloat16 TFLOP/s, float32 TFLOP/s, GB/s)
NAMES = [
    ("NVIDIA A100-SXM4-80GB", 312, 19.5, 1935),
    ("A100", 312, 19.5, 1555),
    ("NVIDIA H100 80GB HBM3", 989, 67, 3350),
    ("NVIDIA H100 PCIe", 756, 51, 2000),
    ("NVIDIA GH200 480GB", 989, 67, 4000),
    ("H200", 989, 67, 4800),
    ("B200", 2250, 75, 7700),
    ("NVIDIA L4", 121, 30.3, 300),
    ("NVIDIA L40S", 362, 91.6, 864),
    ("A10G", 70, 31.5, 600),
    ("NVIDIA A10", 125, 31.2, 600),
    ("Tesla V100-SXM2-16GB", 15.7, 15.7, 900),
    ("Tesla T4", 8.1, 8.1, 300),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1008),
    ("RTX4090", 165.2, 82.6, 1008),
    ("RTXA6000", 154.8, 38.7, 768),
    ("NVIDIA RTX 6000 Ada Generation", 364, 91.1, 960),
]


@pytest.mark.parametrize(("name", "bfloat16", "float32", "memory"), NAMES)
def test_cards_are_found_by_name(name, bfloat16, float32, memory):
    card = find_card(name)
    assert (card.bfloat16, card.float32, card.memory) == (bfloat16, float32, memory)


@pytest.mark.parametrize(
    "name", ["", "Quadro RTX 6000", "T4g", "NVIDIA GeForce RTX 4090 Laptop GPU", "A100-MIG", "NVIDIA A100X"]
)
def test_a_card_that_only_sounds_alike_is_not_known(name):
    assert find_card(name) is None


def test_a_budget_is_told_with_both_numbers(moe):
    steps = steps_of(study(4, 2048), moe, offer(A100))
    assert over_budget(steps, 1.29, None) is over_budget(steps, 1.29, 0.3126) is None
    reason = over_budget(steps, 1.29, 0.3)
    assert reason == (
        "the study would cost about $0.31 in all (15 min, at $1.29 an hour), and at most $0.30 is allowed (--max-total-price)"
    )
    assert "about $0.3102" in over_budget(steps, 1.28, 0.3101) and "$0.3101 is" in over_budget(steps, 1.28, 0.3101)
    unknown = steps_of(study(4, 2048), moe, offer(Gpu("Z9000", 80 * GB)))
    assert over_budget(unknown, 1.29, 0.4) is None
    assert "more than $0.31 in all (14 min, not counting pass," in over_budget(unknown, 1.29, 0.3)


def test_seconds_are_told_in_a_unit_that_fits():
    assert [format_seconds(s) for s in (0.04, 9.44, 9.5, 89, 90, 840, 5399, 5400, 11520)] == [
        "0.0 s", "9.4 s", "10 s", "89 s", "2 min", "14 min", "90 min", "1.5 h", "3.2 h",
    ]  # fmt: skip
