"""What can run is known before anything is paid: stored weights x GPUs x packages; every way out that is named passes itself."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import import_utils

from outliers.errors import BadInput, PlanRefused, UnknownModel
from outliers.hardware import GB, Facts, Gpu, capability_of, find_gpus, parse_gpus
from outliers.machines.answers import read_facts
from outliers.machines.base import Offer
from outliers.model.describe import describe_model, method_of, quantization_of
from outliers.model.quantization import METHODS, Place, kept_as_stored, refusal, required
from outliers.model.source import find_model
from outliers.planning.offers import check_plan
from outliers.planning.plan import make_plan
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import model_info
from outliers.sweep.plan import plan_sweep
from outliers.sweep.sweep import make_sweep
from tests.support import tiny

CONFIGS = Path(__file__).parents[1] / "support" / "configs"
ALL = {
    "kernels": import_utils.KERNELS_MIN_VERSION,
    "triton": "3.5.0",
    "gptqmodel": "7.7",
    "optimum": "2.0",
    "bitsandbytes": "0.50",
    "compressed-tensors": "0.19",
}
FOREIGN = (
    "hqq",
    "quanto",
    "torchao",
    "eetq",
    "aqlm",
    "vptq",
    "higgs",
    "fbgemm_fp8",
    "spqr",
    "bitnet",
    "auto-round",
    "quark",
)
GPUS = {
    "none": (),
    "V100": (("V100", (7, 0)),),
    "T4": (("T4", (7, 5)),),
    "A100": (("A100", (8, 0)),) * 2,
    "L4": (("L4", (8, 9)),),
    "H100": (("H100", (9, 0)),),
    "A100 and H100": (("A100", (8, 0)), ("H100", (9, 0))),
    "unheard of": (("Z9000", None),),
}
PACKAGES = {"made for the study": None, "bare": {}, "all": ALL, "old": ALL | {"kernels": "0.11.0"}}


# The table


@pytest.mark.parametrize("method", [*METHODS, *FOREIGN, "modelopt", "FP8", "unknown"])
def test_every_remedy_passes_in_its_turn(method):
    """On every machine, whatever is installed: no advice in a circle."""
    for gpus, packages in itertools.product(GPUS.values(), PACKAGES.values()):
        place = Place(gpus, packages)
        found = refusal(method, place)
        if found is None:
            continue
        if found.remedy == "plain":
            assert not kept_as_stored("none", method)
            assert METHODS[method].plain
        elif found.remedy == "install":
            # the very requirements that are named, at the least version that each allows
            brought = {
                re.match(r"[\w-]+", text)[0]: (re.findall(r">=([\d.]+)", text) or ["1.0"])[0] for text in found.packages
            }
            assert refusal(method, Place(gpus, {**place.packages, **brought})) is None
        else:
            assert not any(kept_as_stored("auto", other) for other in (None, "mxfp4", "fp8"))


@pytest.mark.parametrize(
    ("method", "runs", "fails"),
    [
        # what transformers demands: 7.5 of MXFP4, 8.9 of FP8, of each GPU
        ("mxfp4", ("T4", "A100", "H100", "unheard of"), ("none", "V100")),
        ("fp8", ("L4", "H100", "unheard of"), ("none", "V100", "T4", "A100", "A100 and H100")),
        ("gptq", ("V100", "A100"), ("none",)),
        ("torchao", (), tuple(GPUS)),
    ],
)
def test_what_runs_where_with_every_package(method, runs, fails):
    assert all(refusal(method, Place(GPUS[name], ALL)) is None for name in runs)
    assert all(refusal(method, Place(GPUS[name], ALL)) is not None for name in fails)
    for packages in (None, {}, {"kernels": "0.11.0", "triton": "3.5.0"}):
        assert all(refusal(method, Place(GPUS[name], packages)) is not None for name in GPUS)


def test_the_table_is_what_the_installed_transformers_asks():
    """Read from its own constants and messages: a newer transformers that asks for more fails here."""
    kernels = f"kernels>={import_utils.KERNELS_MIN_VERSION},<{import_utils.KERNELS_MAX_VERSION}"
    assert required(METHODS["mxfp4"].packages[0]) == required(METHODS["fp8"].packages[0]) == kernels
    assert METHODS["bitsandbytes"].packages == (f"bitsandbytes>={import_utils.BITSANDBYTES_MIN_VERSION}",)
    least = import_utils.COMPRESSED_TENSORS_MIN_VERSION
    assert METHODS["compressed-tensors"].packages == (f"compressed-tensors>={least}",)
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    assert set(METHODS) <= known
    folder = Path(import_utils.__file__).parent.parent / "quantizers"
    assert "compute_capability >= (7, 5)" in (folder / "quantizer_mxfp4.py").read_text()
    assert "(major == 8 and minor < 9)" in (folder / "quantizer_finegrained_fp8.py").read_text()


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0)), ("A100-80GB", (8, 0)), ("A10G", (8, 6)), ("RTX A6000", (8, 6)),
        ("RTX6000-Ada", (8, 9)), ("Quadro RTX 6000", (7, 5)), ("NVIDIA L4", (8, 9)), ("L40S", (8, 9)),
        ("H100-80GB", (9, 0)), ("NVIDIA GH200 480GB", (9, 0)), ("B200", (10, 0)), ("NVIDIA GB10", (12, 1)),
        ("Tesla T4", (7, 5)), ("V100-32GB", (7, 0)), ("K80", (3, 7)), ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("RTX5090", (12, 0)), ("Z9000", None), ("AMD MI300X", None), ("", None),
    ],
)  # fmt: skip
def test_the_capability_of_a_gpu_by_its_name(name, capability):
    assert capability_of(name) == capability
    assert Gpu(name, 1).capability == capability
    assert Gpu(name, 1, (9, 9)).capability == (9, 9), "what a device says counts"


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("GPU-a, NVIDIA A100-SXM4-80GB, 81920, 8.0", [("NVIDIA A100-SXM4-80GB", 81920, (8, 0))]),
        (
            "GPU-a, NVIDIA GB10, [N/A], 12.1\nGPU-b, Odd, name, 7, [N/A]",
            [("NVIDIA GB10", 0, (12, 1)), ("Odd, name", 7, None)],
        ),
        ("GPU-a, Tesla T4, 15360", [("Tesla T4", 15360, None)]),
        ('Field "compute_cap" is not a valid field to query.\n', []),
    ],
)
def test_what_nvidia_smi_says_of_it(text, gpus):
    found = parse_gpus(text)
    assert found == tuple(Gpu(name, mib << 20, capability) for name, mib, capability in gpus)
    facts = Facts(1, 1, 1, 1, found, "3.11")
    assert read_facts(json.loads(json.dumps(asdict(facts)))) == facts, "as an agent sends it"


def test_an_old_nvidia_smi_is_asked_again_without_it(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\ncase \"$1\" in *compute_cap*) echo 'not a valid field'; exit 2;; *) echo 'GPU-a, Tesla T4, 15360';; esac\n"
    )
    smi.chmod(0o755)
    (gpu,) = find_gpus(str(smi))
    assert (gpu.name, gpu.reported, gpu.capability) == ("Tesla T4", None, (7, 5))


# Configs


@pytest.fixture
def folder_of(tmp_path):
    """A folder with the config of a tiny model and no weights, stored as a quantization_config says."""
    number = itertools.count()

    def make(**changes):
        folder = tmp_path / f"model-{next(number)}"
        tiny.make_model(folder, "Qwen3")
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def spec_of(folder, **parts):
    return StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", **parts))


METHODS_REFUSED = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq", "gptqmodel>=1.4.3 and optimum>=1.24.0"),
    ({"quant_method": "awq", "bits": 4}, "awq", "gptqmodel"),
    ({"load_in_8bit": True}, "bitsandbytes", "bitsandbytes>=0.46.1"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors", "compressed-tensors>="),
    *(({"quant_method": name}, name, "can neither be computed with here") for name in FOREIGN),
    # transformers reads names to the letter, and loads what it does not know as if it were plain
    ({"quant_method": "FP8"}, "FP8", "can neither be computed with"),
    ({"quant_algo": "FP8"}, "unknown", "can neither be computed with"),
    ({}, "unknown", "can neither be computed with"),
]


@pytest.mark.parametrize("provider", ["local", "sky", "ssh"])
def test_what_no_machine_computes_with_is_refused_from_the_config(folder_of, workspace, provider, monkeypatch):
    """No weights are there, and no machine is asked: the method, what it needs, and what to do."""
    # the tests' own environment has compressed-tensors, as the judge of number formats
    monkeypatch.setattr("outliers.study.prepare.installed_packages", dict)
    folder = folder_of()
    plain = json.loads((folder / "config.json").read_text())
    for quantization, method, lacking in METHODS_REFUSED:
        (folder / "config.json").write_text(json.dumps(plain | {"quantization_config": quantization}))
        with pytest.raises(PlanRefused) as refused:
            model_info(spec_of(folder, compute={"provider": provider}), workspace, weights=False)
        said = str(refused.value)
        assert f"is stored in {method}, which " in said
        assert lacking in said
        assert "name a checkpoint of the model with plain weights" in said or "pip install" in said
        assert "--quantization" not in said


def test_other_names_for_it_in_a_config_are_not_dropped(folder_of, workspace):
    for key in ("compression_config", "quantization"):
        folder = folder_of(**{key: {"bits": 4, "group_size": 64}})
        with pytest.raises(PlanRefused, match=f"named by {key}, which transformers does not read"):
            model_info(spec_of(folder), workspace, weights=False)


def test_what_is_no_object_is_refused_by_name():
    class Config:
        quantization_config = "fp8"

        def get_text_config(self):
            return self

    with pytest.raises(UnknownModel, match="quantization_config in the config is 'fp8'"):
        quantization_of(Config())
    assert method_of(None) is None


def test_it_can_be_looked_at_all_the_same(folder_of, workspace):
    """`models inspect` shows what there is; only a study or its plan is refused."""
    spec = spec_of(folder_of(quantization_config={"quant_method": "hqq"}))
    info = describe_model(find_model(spec.model, workspace, weights=False), "bfloat16", workspace)
    assert (info.quantization, info.stored_quantization) == ("hqq", "hqq")
    with pytest.raises(BadInput, match="can't be undone on loading; mxfp4 and fp8 can: name a checkpoint"):
        describe_model(info.source, "bfloat16", workspace, quantization="none")


# Plans


class Catalog:
    """A provider that only offers."""

    def __init__(self, *offers):
        self._offers = offers

    def offers(self, request):
        return self._offers, ()


def offer(provider, *gpus, ram=4000):
    facts = Facts(8, ram * GB, ram * GB, 9000 * GB, tuple(Gpu(name, size * GB) for name, size in gpus), "3.11")
    return Offer(
        provider, "+".join(name for name, _ in gpus) or "processor", facts, 0.0 if provider == "local" else 1.0
    )


def published(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    return folder


def real(name, tmp_path, quantization="auto", **compute):
    return StudySpec.model_validate(
        {
            "model": {"id": str(published(name, tmp_path)), "dtype": "bfloat16", "quantization": quantization},
            "corpus": {"source": "builtin:python-docs"},
            "compute": {"provider": "sky", **compute},
        }
    )


def test_gpt_oss_is_planned_as_plain_weights(tmp_path, workspace):
    """20.9 billion parameters of two bytes; the same model asked plain is the same plan."""
    plans = []
    for quantization in ("auto", "none"):
        spec = real("gpt-oss-20b", tmp_path, quantization)
        info = model_info(spec, workspace, weights=False)
        plans.append(make_plan(spec, info, Catalog(offer("sky", ("L4", 24)), offer("sky", ("A100-80GB", 80)))))
    assert plans[0] == plans[1]
    (plan, _) = plans
    assert (plan.quantization, plan.stored_quantization) == (None, "mxfp4")
    assert plan.weight_bytes == pytest.approx(41.83e9, rel=1e-3)
    assert plan.checkpoint_bytes == pytest.approx(13.76e9, rel=1e-2)
    assert [one["name"] for one in plan.offers] == ["A100-80GB"]
    assert plan.offers[0]["gpus"][0]["compute_capability"] == "8.0"
    (small,) = plan.refusals
    assert re.search(r"L4: the study needs [\d.]+ GB on one GPU, the largest has 24\.0 GB", small)
    assert (
        "(the weights take 41.83 GB: they are stored in mxfp4, 13.76 GB, and made plain bfloat16 on loading)" in small
    )


def test_fp8_of_671_billion_is_refused_with_both_numbers(tmp_path, workspace):
    spec = real("deepseek-v3", tmp_path)
    info = model_info(spec, workspace, weights=False)
    eight, large = offer("sky", *[("H100", 80)] * 8), offer("sky", *[("B200", 192)] * 8)
    with pytest.raises(PlanRefused) as refused:
        check_plan(demand_of(spec, info), Catalog(eight), 0)
    assert re.search(r"need 1\d{3}\.\d+ GB over 8 GPUs of 80 GB", str(refused.value))
    assert "(the weights take 1.34 TB: they are stored in fp8, 0.69 TB, and made plain" in str(refused.value)
    assert "more (--gpu-count)" in str(refused.value)
    assert make_plan(spec, info, Catalog(large)).offers or make_plan(spec, info, Catalog(offer("sky"))).offers


def test_weights_that_were_asked_to_stay_are_refused_where_they_can_not(tmp_path, workspace):
    """On a machine whose environment is made for it before anything is asked; here GPU by GPU, with a remedy that passes."""
    with pytest.raises(PlanRefused) as refused:
        model_info(real("gpt-oss-20b", tmp_path, "checkpoint"), workspace, weights=False)
    kernels = f"kernels>={import_utils.KERNELS_MIN_VERSION},<{import_utils.KERNELS_MAX_VERSION}"
    assert f"which needs {kernels} and triton>=3.4.0 (which are not in the environment" in str(refused.value)
    assert "--quantization none computes in bfloat16, with 41.83 GB of weights instead of 13.76 GB" in str(
        refused.value
    )
    spec = real("deepseek-v3", tmp_path, "checkpoint", provider="local")
    info = describe_model(
        find_model(spec.model, workspace, weights=False), "bfloat16", workspace, quantization="checkpoint"
    )
    assert info.quantization == "fp8"
    here = offer("local", *[("A100", 80)] * 8)
    plan = make_plan(spec, info, Catalog(here))
    (said,) = plan.refusals
    assert "needs compute capability 8.9 (A100 has 8.0), and kernels>=" in said
    # 1.34 TB of plain weights do not fit 640 GB either: that is said, and what is named passes
    assert "; its GPUs have 0.60 TB for that, not 1.34 TB: choose more or larger GPUs" in said
    none = real("deepseek-v3", tmp_path, "none", provider="local", gpu_count=0)
    assert make_plan(none, model_info(none, workspace, weights=False), Catalog(here)).offers


def test_a_sweep_shows_which_of_its_studies_can_not_run(tmp_path, workspace, folder_of):
    sweep = make_sweep(
        {
            "defaults": {
                "corpus": {"source": "builtin:python-docs"},
                "compute": {"provider": "sky", "workspace": str(workspace.root)},
            },
            "study": [
                {"name": "gpt", "model": {"id": str(published("gpt-oss-20b", tmp_path)), "dtype": "bfloat16"}},
                {"name": "awq", "model": str(folder_of(quantization_config={"quant_method": "awq", "bits": 4}))},
            ],
        },
        "two",
    )
    gpt, _ = sweep.studies
    none = gpt.spec.model.model_copy(update={"quantization": "none"})
    same = gpt.model_copy(update={"spec": gpt.spec.model_copy(update={"model": none})})
    assert same.capture_key == gpt.capture_key
    plan = plan_sweep(sweep, lambda name, root: Catalog(offer("sky", ("H100", 80))))
    found = {study.name: study for study in plan.studies}
    assert (found["gpt"].refused, found["gpt"].machine) == (None, "H100")
    assert "is stored in awq, which needs gptqmodel" in found["awq"].refused


def test_amounts_that_differ_look_different(workspace, tmp_path):
    """A tiny model kept in FP8 against itself made plain: not 0 GB instead of 0 GB."""
    folder = tmp_path / "tiny"
    tiny.make_model(folder, "Qwen3")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanRefused) as refused:
        model_info(spec_of(folder, model={"quantization": "checkpoint"}), workspace)
    plain, stored = re.search(r"with (\S+ \S+) of weights instead of (\S+ \S+)$", str(refused.value)).groups()
    assert plain != stored
    assert not re.match(r"0\.0+ ", stored)


def test_a_byte_too_little_is_seen_in_the_refusal(tmp_path, workspace):
    spec = spec_of(tiny.make_model(tmp_path / "model"))
    info = model_info(spec, workspace)
    needed = demand_of(spec, info).ram_bytes
    facts = Facts(8, 64 * GB, needed - 1, 90 * GB, (), "3.11")
    (said,) = make_plan(spec, info, Catalog(Offer("sky", "a", facts, 1.0))).refusals
    one, other = re.search(r"needs (\S+) GB of memory without a GPU, (\S+) GB is free", said).groups()
    assert float(one) > float(other)
