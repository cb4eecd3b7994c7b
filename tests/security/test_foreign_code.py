"""A model's files run nothing: code that lies beside a model, or that its files name, stays unread; pickles are never loaded."""

from __future__ import annotations

import ast
import json
import pickle
import sys
from pathlib import Path

import pytest

from outliers.capture.load import load_model
from outliers.errors import OutliersError, UnknownModel
from outliers.model.pretrained import load_config, load_tokenizer
from outliers.model.source import find_model
from outliers.spec import ModelSpec, StudySpec
from outliers.study.prepare import prepare
from tests.support import gguf_files, tiny

ROOT = Path(__file__).resolve().parent.parent.parent
READERS = ("from_pretrained", "from_config")
"""Calls of transformers that run code of a model's folder where they are allowed to."""
PICKLES = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("joblib", "load")}


class Canary:
    """Unpickled, it makes a file: what a hostile pickle would do with worse."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


@pytest.fixture
def model(tmp_path):
    """A whole tiny model, and the file that code of its folder would make."""
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.make_model(folder)
    return folder, tmp_path / "ran"


def study_of(folder, workspace):
    """Everything that reads a model's files: prepare, config, tokenizer, weights."""
    prepared = prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs")), workspace)
    load_tokenizer(prepared.model.source, workspace)
    return load_model(prepared.model, workspace, "cpu")


def change(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def code(folder, mark):
    """Modules by the names that a folder's auto_map gives them, each of which makes the file `mark` when it is imported."""
    for name in ("evil", "modeling_evil", "tokenization_evil", "configuration_evil"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: ...\n")
    place = folder / "custom_generate"
    place.mkdir()
    (place / "generate.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (place / "requirements.txt").write_text("")


MAPS = {
    "config": (
        "config.json",
        {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": "evil.Evil"}},
    ),
    "config, another repository": ("config.json", {"auto_map": {"AutoModelForCausalLM": "someone/else--evil.Evil"}}),
    "config, an unknown type": ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}},
    ),
    "generation": ("generation_config.json", {"custom_generate": "custom_generate", "auto_map": {"AutoConfig": "evil.Evil"}}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}}),
    "attention of the hub": ("config.json", {"attn_implementation": "someone/evil"}),
    "attention of the hub, by its inner name": ("config.json", {"_attn_implementation": "someone/evil:Evil"}),
    "experts of the hub": ("config.json", {"experts_implementation": "someone/evil@main"}),
}  # fmt: skip


@pytest.mark.parametrize("what", MAPS)
def test_code_that_a_folder_names_is_not_run(model, workspace, what, monkeypatch):
    folder, mark = model
    code(folder, mark)
    monkeypatch.chdir(folder)
    name, values = MAPS[what]
    change(folder / name, **values)
    before = set(sys.modules)
    try:
        study_of(folder, workspace)
    except OutliersError as error:
        assert folder.name in str(error)
    assert not mark.exists()
    assert not [module for module in set(sys.modules) - before if "evil" in module.lower()]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("attention of the hub", "is not an implementation of transformers' own: code from elsewhere is never run"),
        ("attention of the hub, by its inner name", "code from elsewhere is never run"),
        ("experts of the hub", "code from elsewhere is never run"),
        ("config, an unknown type", "contains custom code"),
    ],
)
def test_what_only_foreign_code_could_run_is_refused(model, workspace, what, words):
    """In our own words, so whatever packages are installed: with kernels, transformers would fetch and run the code."""
    folder, _ = model
    name, values = MAPS[what]
    change(folder / name, **values)
    with pytest.raises(UnknownModel, match=words):
        study_of(folder, workspace)


def test_a_model_with_an_auto_map_is_read_by_the_librarys_own_class(model, workspace):
    """Published models of a known type often carry one: it changes nothing."""
    folder, mark = model
    plain = {name: tensor.clone() for name, tensor in study_of(folder, workspace).state_dict().items()}
    code(folder, mark)
    change(folder / "config.json", **MAPS["config"][1])
    loaded = study_of(folder, workspace)
    assert type(loaded).__module__ == "transformers.models.llama.modeling_llama"
    assert all((tensor == plain[name]).all() for name, tensor in loaded.state_dict().items())
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin", "tokenizer.pkl", "vocab.pkl"])
def test_a_pickle_beside_a_model_is_never_loaded(model, workspace, name):
    folder, mark = model
    (folder / name).write_bytes(pickle.dumps(Canary(mark)))
    try:
        study_of(folder, workspace)
    except UnknownModel as error:
        assert name in str(error)
    assert not mark.exists()


def test_a_model_of_pickles_alone_is_refused(model, workspace):
    folder, mark = model
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(mark)))
    with pytest.raises(UnknownModel, match="pickled weights"):
        study_of(folder, workspace)
    assert not mark.exists()


def test_a_pickle_by_the_name_of_safetensors_is_refused(model, workspace):
    folder, mark = model
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(mark)))
    with pytest.raises(UnknownModel):
        study_of(folder, workspace)
    assert not mark.exists()


def test_a_gguf_file_is_read_without_what_lies_beside_it(tmp_path, workspace):
    """Neither run, nor believed, nor saved into the workspace."""
    path, mark = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm"), tmp_path / "ran"
    code(tmp_path, mark)
    for name, values in MAPS.values():
        change(tmp_path / name, **values)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(mark)))
    source = find_model(ModelSpec(id=str(path)), workspace)
    assert load_config(source, workspace).model_type == "llama"
    load_tokenizer(source, workspace)
    assert not mark.exists()
    saved = [file for file in workspace.models.rglob("*") if file.is_file()]
    assert saved
    assert not [file for file in saved if b"evil" in file.read_bytes().lower() or file.suffix == ".py"]


def calls():
    """(file, line, call) of every call in the product and its benchmarks."""
    for folder in ("outliers", "tasks", "flows", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT), node.lineno, node


def test_no_call_that_could_run_a_models_code_is_without_its_no():
    found = [(path, line, call) for path, line, call in calls() if getattr(call.func, "attr", "") in READERS]
    assert len(found) >= 6
    for path, line, call in found:
        said = {word.arg: word.value for word in call.keywords}.get("trust_remote_code")
        assert isinstance(said, ast.Constant), f"{path}:{line} does not say trust_remote_code=False itself"
        assert said.value is False, f"{path}:{line}"


def test_nothing_unpickles():
    for path, line, call in calls():
        owner = getattr(getattr(call.func, "value", None), "id", "")
        assert (owner, getattr(call.func, "attr", "")) not in PICKLES, f"{path}:{line}"
        if (owner, getattr(call.func, "attr", "")) == ("np", "load"):
            words = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
            assert words.get("allow_pickle") is False, f"{path}:{line}"
