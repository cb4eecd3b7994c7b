"""The file of a sweep: its mistakes, its matrix, and the ready-made ones."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.corpus.tokens import load_corpus
from outliers.errors import BadInput
from outliers.study.demand import demand_of
from outliers.study.placement import total_needed
from outliers.study.prepare import model_info, prepare
from outliers.sweep.sweep import Sweep, make_sweep, read_sweep
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parents[1] / "support" / "configs"


def sweep_of(text, **changes) -> Sweep:
    return make_sweep(tomllib.loads(text), "some.toml", None, changes)


def test_defaults_matrix_and_a_studys_own_values_are_laid_over_each_other():
    sweep = sweep_of(
        """
        parallel = 3
        [defaults]
        publish_to = "file:///data/atlas"
        model = {dtype = "float16"}
        corpus = {source = "builtin:python-docs", num_sequences = 8}
        [matrix]
        dtype = ["float32", "bfloat16"]
        "criteria.magnitude" = [6, 8.5]
        [[study]]
        model = "builtin:smollm2"
        corpus = {num_sequences = 2}
        [[study]]
        name = "own"
        model = {id = "a/b", dtype = "bfloat16"}
        label = "again"
        """
    )
    assert (sweep.parallel, sweep.stagger_seconds) == (3, 15)
    found = {
        study.name: (
            study.spec.model.id,
            study.spec.model.dtype,
            study.spec.criteria.magnitude,
            study.spec.corpus.num_sequences,
            study.spec.label,
        )
        for study in sweep.studies
    }
    assert found == {
        "smollm2-float32-6": ("builtin:smollm2", "float32", 6.0, 2, None),
        "smollm2-float32-8.5": ("builtin:smollm2", "float32", 8.5, 2, None),
        "smollm2-bfloat16-6": ("builtin:smollm2", "bfloat16", 6.0, 2, None),
        "smollm2-bfloat16-8.5": ("builtin:smollm2", "bfloat16", 8.5, 2, None),
        "own-6": ("a/b", "bfloat16", 6.0, 8, "again"),
        "own-8.5": ("a/b", "bfloat16", 8.5, 8, "again"),
    }
    assert {study.spec.publish_to for study in sweep.studies} == {"file:///data/atlas"}
    assert {study.spec.corpus.source for study in sweep.studies} == {"builtin:python-docs"}


def test_a_matrix_of_models_needs_no_entries():
    sweep = sweep_of('[matrix]\nmodel = ["a/one", "b/two"]\nsites = [["resid"], ["attn_in", "mlp_in"]]\n')
    assert [study.name for study in sweep.studies] == [
        "one-resid",
        "one-attn_in-mlp_in",
        "two-resid",
        "two-attn_in-mlp_in",
    ]


def test_paths_are_as_seen_from_the_file(tmp_path):
    place = tmp_path / "my sweeps"
    (place / "models" / "here").mkdir(parents=True)
    (place / "notes.txt").write_text("text")
    (place / "x.toml").write_text(
        '[defaults]\ncorpus = "notes.txt"\n[[study]]\nmodel = "models/here"\n[[study]]\nmodel = "./not/there"\n'
        '[[study]]\nmodel = "some/hub-model"\n[[study]]\nmodel = "builtin:smollm2"\ncorpus = "builtin:python-docs"\n'
    )
    sweep = read_sweep(place / "x.toml", {"compute": {"workspace": "/ws"}}, {"parallel": "4"})
    assert (sweep.name, sweep.parallel) == ("x", 4)
    here = str(place / "models" / "here")
    assert [study.spec.model.id for study in sweep.studies] == [
        here,
        str(place / "not" / "there"),
        "some/hub-model",
        "builtin:smollm2",
    ]
    assert [study.from_hub for study in sweep.studies] == [False, False, True, False]
    assert sweep.studies[0].spec.corpus.source == str(place / "notes.txt")
    assert sweep.studies[3].spec.corpus.source == "builtin:python-docs"
    assert {study.spec.compute.workspace for study in sweep.studies} == {"/ws"}


MISTAKES = [
    # what is in the file, what the message must say: the place, the field, what is allowed
    ("", "no study: write a [[study]] with its model, or model = [...] in [matrix]"),
    ("parallell = 2", "parallell is not a field (did you mean parallel?); known: name, parallel, stagger_seconds"),
    ("parallel = 0\n[[study]]\nmodel = 'a/b'", "parallel: Input should be greater than or equal to 1 (given: 0)"),
    ("study = 3", "study: write [[study]], in double brackets, once for each study"),
    ("[study]\nmodel = 'a/b'\npublish_to = 's3://me:hunter2@b/x'", "study: write [[study]], in double brackets"),
    ("study = ['a/b']", "study.0: a study is a table: write [[study]], and below it model = 'a/b'"),
    ("[[defaults]]\nlabel = 'x'\n[[study]]\nmodel = 'a/b'", "defaults: write [defaults], in single brackets"),
    ("[[matrix]]\ndtype = ['float32']\n[[study]]\nmodel = 'a/b'", "matrix: write [matrix], in single brackets"),
    ("[[studies]]\nmodel = 'a/b'", "studies is not a field (did you mean study?)"),
    ("[[study]]\nmodel = 'a/b'\nparallel = 2", "parallel is not a field of a study: write it above the first table"),
    ("[[study]]\nmodel = 'a/b'\ndtype = 'float32'", "dtype is not a field (did you mean model.dtype?)"),
    ("publish_to = 's3://b/x'\n[[study]]\nmodel = 'a/b'", "publish_to is not a field of the sweep: write publish_to below [def"),
    ("num_sequences = 2\n[[study]]\nmodel = 'a/b'", "of the sweep: write corpus.num_sequences below [defaults], or into a"),
    ("[corpus]\nseed = 2\n[[study]]\nmodel = 'a/b'", "corpus is not a field of the sweep: write [defaults.corpus], or into a [["),
    ("[[study]]\nmodel = ['a/b', 'c/d']", "model: one for a study; several go into [matrix], model = ['a/b', 'c/d']"),
    ("[[study]]\nmodel = 'a/b'\n[[study.corpus]]\nseed = 2", "corpus: write [study.corpus], in single brackets: a study has"),
    ("[[study]]\nname = 'x'", "study 1 (x): model is missing: a hub id, a folder"),
    ("[[study]]\nmodel = 'a/b'\n[[study]]\nmodel = {id = 'c/d', dtyp = 'x'}", "study 2: model.dtyp is not a field (did you"),
    ("[[study]]\nmodel = 'a/b'\ncorpuss = 'x'", "study 1: corpuss is not a field (did you mean corpus?); known: model, corp"),
    ("[[study]]\nmodel = 'a/b'\ncompute = 4", "study 1: compute: Input should be a valid dictionary"),
    ("[[study]]\nname = 'a b'\nmodel = 'a/b'", "study 1: name: letters, digits"),
    ("[[study]]\nmodel = 'a/b'\n[defaults.corpus]\nnum_sequences = 0", "[defaults]: corpus.num_sequences: Input should be"),
    ("[[study]]\nmodel = 'a/b'\n[defaults]\nsites = ['resid']", "[defaults]: sites is not a field (did you mean capture.sites?)"),
    ("[[study]]\nmodel = 'a/b'\n[matrix]\ndtype = ['float8']", "[matrix]: model.dtype: Input should be 'auto', 'float32'"),
    ("[[study]]\nmodel = 'a/b'\n[matrix]\ndtypes = ['float32']", "[matrix]: dtypes is not a field (did you mean dtype?); known"),
    ("[[study]]\nmodel = 'a/b'\n[matrix]\ndtype = []", "[matrix]: dtype takes a list of different values; got []"),
    ("[[study]]\nmodel = 'a/b'\n[matrix]\nseed = [1, 1]", "[matrix]: seed takes a list of different values; got [1, 1]"),
    ("[[study]]\nmodel = 'a/b'\n[matrix]\nseed = 1", "matrix.seed: takes a list of values: seed = [1]"),
    ("[[study]]\nmodel = 'a/b'\n[matrix]\nseed = [1]\n'corpus.seed' = [2]", "[matrix]: corpus.seed is there twice, by two"),
    ("[[study]]\nmodel = 'a/b'\n[matrix]\nseed = [" + ",".join(map(str, range(1001))) + "]", "more than 1,000 studies"),
    ("[[study]]\nmodel = 'a/m'\n[[study]]\nmodel = 'b/m'", "two studies are called m: give each [[study]] a name of its own"),
    ("[[study]]\nname = 'x'\nmodel = 'a/b'\n[[study]]\nname = 'y'\nmodel = 'a/b'", "x and y are the same study: leave one"),
    ("[matrix]\npublish_to = 's3://me:hunter2@b/x'", "matrix.publish_to: takes a list of values: publish_to = ['s3://...@b/x']"),
    ("[[study]]\nmodel = 'c/d'\n[matrix]\nmodel = ['a/b']", "has its own model, so that none of ['a/b'] would run: write these"),
    ("[[study]]\nmodel = {id = 'a/b', dtype = 'float32'}\n[matrix]\ndtype = ['bfloat16']", "has its own model.dtype, so that"),
    ("[[study]]\nmodel = 'a/b'\npublish_to = 's3://me:hunter2@b/x'", "study 1: publish_to: a URL must not carry a user"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_names_file_entry_field_and_what_is_allowed(text, message):
    with pytest.raises(BadInput) as caught:
        sweep_of(text)
    said = str(caught.value)
    assert said.startswith("some.toml: ")
    assert message in said
    assert "hunter2" not in said


def test_every_mistake_is_told_once():
    with pytest.raises(BadInput) as caught:
        sweep_of(
            "[defaults.corpus]\nseed = -1\n[[study]]\nmodel = 'a/b'\n[[study]]\nmodel = 'c/d'\ncriteria = {magnitude = 0}"
        )
    first, second = str(caught.value).splitlines()
    assert "[defaults]: corpus.seed" in first
    assert "study 2: criteria.magnitude" in second


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"publish_to": "demo/atlas"},
            {},
            "publish_to: 'demo/atlas' is not s3://bucket/prefix, hf://datasets/ORG/NAME/prefix or file:///folder",
        ),
        ({"compute": {"workspace": ""}, "label": "a b"}, {}, "label: "),
        ({}, {"parallel": "99"}, "parallel: Input should be less than or equal to 64 (given: '99')"),
        ({}, {"parallel": "two"}, "parallel: Input should be a valid integer"),
    ],
)
def test_the_file_is_not_blamed_for_what_was_given_beside_it(tmp_path, changes, settings, message):
    path = tmp_path / "x.toml"
    path.write_text("parallel = 2\n[[study]]\nmodel = 'a/b'\n")
    with pytest.raises(BadInput) as caught:
        read_sweep(path, changes, settings)
    assert str(caught.value).startswith(f"beside {path}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[[study]\n", " is not TOML: "),
        (b"\xff\xfe", " is not TOML: "),
        (None, " can't be read: No such"),
        (
            b"[[study]]\nmodel = ''",
            ": study 1: model.id: String should have at least 1 character",
        ),  # not the file's folder
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(f"{tmp_path / 'x.toml'}{message}")):
        read_sweep(tmp_path / "x.toml")


@settings(deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 3))
def test_a_matrix_is_every_combination_once(sizes, entries):
    """Against itertools over the fields that were drawn."""
    fields = ("seed", "num_sequences", "sequence_length", "batch_sequences")[: len(sizes)]
    axes = [tuple(range(2, 2 + size)) for size in sizes]
    content = {
        "matrix": dict(zip(fields, axes, strict=True)),
        "study": [{"model": f"org/m{n}"} for n in range(entries)],
    }
    sweep = make_sweep(content, "drawn")
    found = [
        (study.spec.model.id, *(getattr(study.spec.corpus, f, study.spec.capture.batch_sequences) for f in fields))
        for study in sweep.studies
    ]
    assert found == [(f"org/m{n}", *cell) for n in range(entries) for cell in itertools.product(*axes)]
    assert len({study.name for study in sweep.studies}) == len(found)


def test_an_axis_that_some_entries_override_holds_for_the_others():
    sweep = sweep_of("[matrix]\nmodel = ['a/b']\n[[study]]\nmodel = 'c/d'\n[[study]]\nlabel = 'again'\n")
    assert [study.spec.model.id for study in sweep.studies] == ["c/d", "a/b"]


def test_studies_of_one_capture_follow_each_other_on_a_rented_machine():
    """In the order of the first of each: one that is kept for the next waits for no other model. Here, as in the file."""
    text = (
        "[matrix]\nmagnitude = [6, 8]\ndtype = ['float32', 'bfloat16']\n[[study]]\nmodel = 'a/b'\n[[study]]\nmodel = 'c/d'\n"
        "[[study]]\nname = 'late'\nmodel = 'a/b'\nlabel = 'again'\n[defaults.compute]\nprovider = "
    )
    here = sweep_of(text + "'local'")
    cells = ["6-float32", "6-bfloat16", "8-float32", "8-bfloat16"]
    assert [study.name for study in here.studies] == [f"{name}-{cell}" for name in ("b", "d", "late") for cell in cells]
    assert [study.name for study in sweep_of(text + "'sky'").studies] == [
        "b-6-float32", "b-8-float32", "late-6-float32", "late-8-float32",
        "b-6-bfloat16", "b-8-bfloat16", "late-6-bfloat16", "late-8-bfloat16",
        "d-6-float32", "d-8-float32", "d-6-bfloat16", "d-8-bfloat16",
    ]  # fmt: skip


def test_what_must_be_done_first_is_said_of_the_models_that_are_not_there(tmp_path):
    (tmp_path / "here").mkdir()
    path = tmp_path / "x.toml"
    path.write_text("needs = 'make it'\n" + "".join(f"[[study]]\nmodel = '{m}'\n" for m in ("./here", "./gone", "a/b")))
    assert read_sweep(path).remedy == "make it (for gone)"
    (tmp_path / "gone").mkdir()
    assert read_sweep(path).remedy is None


def test_ranges_of_sequences_lie_within_each_other(tmp_path, workspace):
    """num_sequences in a matrix: the first 2 sequences of the corpus are those of its first 5."""
    model = tiny.make_model(tmp_path / "model", "Llama")
    sweep = make_sweep(
        {
            "defaults": {"corpus": {"source": "builtin:python-docs", "sequence_length": 32}},
            "matrix": {"num_sequences": [2, 5], "packing": ["joined", "documents"]},
            "study": [{"model": model}],
        },
        "ranges",
    )
    ids = {}
    for study in sweep.studies:
        corpus = study.spec.corpus
        ids[corpus.packing, corpus.num_sequences] = load_corpus(
            prepare(study.spec, workspace).corpus, workspace
        ).token_ids
    for packing in ("joined", "documents"):
        assert (ids[packing, 5][:2] == ids[packing, 2]).all()
        assert len(ids[packing, 5]) == 5


SHARED = [
    # what differs from the first study, and whether both read one capture on one machine
    ({"criteria": {"magnitude": 8}}, True),
    ({"label": "again"}, True),
    ({"publish_to": "file:///elsewhere"}, True),
    ({"capture": {"perplexity": True}}, True),
    ({"compute": {"provider": "ssh", "host": "lab1", "gpu_count": 1}}, True),
    ({"compute": {"provider": "ssh", "host": "lab2"}}, False),
    ({"compute": {"provider": "sky", "host": "lab1"}}, False),
    ({"compute": {"provider": "ssh", "host": "lab1", "machine": "other"}}, False),
    ({"compute": {"provider": "ssh", "host": "lab1", "workspace": "/other"}}, False),
    ({"capture": {"sites": ["resid"]}}, False),
    ({"corpus": {"seed": 1}}, False),
    ({"model": {"id": "a/b", "dtype": "float32"}}, False),
]


@pytest.mark.parametrize(("change", "shared"), SHARED, ids=[str(change) for change, _ in SHARED])
def test_which_studies_share_a_capture(change, shared):
    entry = {"model": {"id": "a/b"}, "compute": {"provider": "ssh", "host": "lab1", "workspace": "/ws"}}
    other = entry | change
    if "compute" in change:
        other["compute"] = {"workspace": "/ws"} | change["compute"]
    one = make_sweep({"study": [entry]}, "one").studies[0]
    two = make_sweep({"study": [other]}, "two").studies[0]
    assert (one.capture_key == two.capture_key) == shared


# ready-made files


@pytest.mark.parametrize("name", ["moe", "qwen3-dense", "maximum-activations", "offline"])
def test_a_ready_made_file_is_read(name):
    sweep = read_sweep(ROOT / "sweeps" / f"{name}.toml")
    assert len(sweep.studies) == {"moe": 7, "qwen3-dense": 5, "maximum-activations": 23, "offline": 5}[name]
    rented = {study.spec.compute.provider for study in sweep.studies} == {"sky"}
    assert rented == (name != "offline")
    if rented:
        assert all(study.from_hub and study.spec.compute.max_total_price for study in sweep.studies)


def test_the_gpus_that_are_asked_hold_the_moe_models(tmp_path, workspace):
    """By their published configs: nothing is asked of the hub."""
    for study in read_sweep(ROOT / "sweeps" / "moe.toml").studies:
        short = study.spec.model.id.split("/")[1].lower()
        (config,) = [path for path in CONFIGS.glob("*.json") if short.startswith(path.stem)]
        folder = tmp_path / config.stem
        folder.mkdir()
        (folder / "config.json").write_text(config.read_text())
        model = study.spec.model.model_copy(update={"id": str(folder), "dtype": "bfloat16"})
        spec = study.spec.model_copy(update={"model": model})
        placed = demand_of(spec, model_info(spec, workspace, weights=False)).place_evenly()
        fullest = max(total_needed(placed.weight_bytes(gpu) + placed.work_bytes) for gpu in placed.gpus)
        asked = spec.compute.min_vram * 1e9
        assert asked * 0.5 < fullest <= asked, f"{short}: {fullest / 1e9:.1f} GB a GPU"


def test_the_gpus_that_are_asked_hold_the_dense_models():
    """Two bytes a parameter, as the names give them, and a tenth and 1.5 GB more."""
    for study in read_sweep(ROOT / "sweeps" / "qwen3-dense.toml").studies:
        billions = float(study.spec.model.id.rsplit("-", 1)[1].removesuffix("B"))
        assert 2 * billions * 1.1 + 1.5 < study.spec.compute.min_vram


def test_the_file_is_read_without_prefect_or_torch():
    script = (
        "import sys; from pathlib import Path; from outliers.sweep.sweep import read_sweep; import outliers.sweep.outcome;"
        f"read_sweep(Path({str(ROOT / 'sweeps' / 'moe.toml')!r})); print('prefect' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False False", done.stderr


def test_of_two_fields_named_experts_the_capture_has_the_bare_name_as_on_the_command_line():
    sweep = sweep_of(
        '[matrix]\nexperts = ["all", "routing"]\n"probe.experts" = [["1.68"], ["super"]]\n[[study]]\nmodel = "a/b"\n'
    )
    found = [(study.spec.capture.experts, study.spec.probe.experts) for study in sweep.studies]
    assert found == [(mode, (name,)) for mode in ("all", "routing") for name in ("1.68", "super")]
