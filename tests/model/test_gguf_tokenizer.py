"""The tokenizer of a GGUF file gives the ids that llama.cpp and the model's own family give, or is refused by name."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outliers.errors import UnknownModel
from outliers.files.sealed import LISTING
from outliers.model.gguf import FOLDER, gguf_folder
from outliers.model.gguf_header import read_header
from outliers.model.gguf_tokenizer import make_tokenizer
from outliers.model.pretokenizers import PRE_TOKENIZERS
from outliers.model.pretrained import load_config, load_tokenizer
from outliers.model.source import find_model
from outliers.spec import ModelSpec
from tests.support import gguf_files, llama_cpp

RECORDED = json.loads(llama_cpp.RECORDED.read_text())


def smollm2(workspace) -> Path:
    return Path(find_model(ModelSpec(id="builtin:smollm2"), workspace).path)


def ids(path: Path, text: str, *, ends: bool = False) -> list[int]:
    return make_tokenizer(read_header(path), path.name)(text, add_special_tokens=ends).input_ids


def through_workspace(path: Path, workspace):
    """The tokenizer as a study gets it: made, saved, and loaded again."""
    return load_tokenizer(find_model(ModelSpec(id=str(path)), workspace), workspace)


def test_smollm2_reads_what_llama_cpp_reads(workspace):
    """Digits, blanks, scripts, emoji, marks, contractions, code, control characters, long words, special tokens."""
    path = smollm2(workspace)
    tokenizer = make_tokenizer(read_header(path), path.name)
    assert RECORDED["build"] == llama_cpp.BUILD
    for text, expected in zip(llama_cpp.TEXTS, RECORDED["smollm2"], strict=True):
        assert tokenizer(text, add_special_tokens=False).input_ids == expected, text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_smollm2_reads_what_its_familys_own_recipe_reads(workspace):
    """SmolLM's tokenizer as it was trained: digits one by one, then GPT-2's words; made by hand, of another reader's values."""
    import gguf

    path = smollm2(workspace)
    fields = gguf.GGUFReader(path).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    own = Tokenizer(models.BPE({t: n for n, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    own.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    own.decoder = decoders.ByteLevel()
    used = make_tokenizer(read_header(path), path.name)
    texts = [text for text in llama_cpp.TEXTS if "<|" not in text]
    texts += [gguf_files.PLAIN, gguf_files.MARKS, Path(transformers.__file__).read_text()]
    for text in texts:
        assert used(text).input_ids == own.encode(text).ids, text[:60]
        assert used.decode(used(text).input_ids) == text


@pytest.mark.parametrize(("names", "expected"), RECORDED["byte_level"], ids=lambda value: str(value[0])[:20])
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(tmp_path, names, expected):
    """On a vocabulary whose tokens run across every cut; BOS is where llama.cpp puts it."""
    for pre in names:
        path = gguf_files.write_byte_level(tmp_path / f"{pre}.gguf", pre)
        for text, said in zip((gguf_files.PLAIN, gguf_files.MARKS), expected, strict=False):
            assert ids(path, text, ends=True) == said, pre


def test_each_known_pre_tokenizer_was_compared():
    assert sorted(name for names, _ in RECORDED["byte_level"] for name in names) == sorted(PRE_TOKENIZERS)


def test_a_family_that_normalizes_reads_composed_text(tmp_path):
    """transformers' own Qwen2Tokenizer of the same vocabulary, on text that llama.cpp reads as it stands."""
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "qwen2")
    tokens, merges = gguf_files.trained()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    own = transformers.Qwen2Tokenizer(
        {t: n for n, t in enumerate(tokens)}, pairs, unk_token=None, eos_token=None, pad_token=None
    )
    for text in (gguf_files.PLAIN, gguf_files.MARKS):
        assert ids(path, text) == own(text).input_ids
    assert ids(path, "e\u0301") == ids(path, "é")


def test_a_family_whose_pattern_llama_cpp_adapts_keeps_marks_with_their_letters(tmp_path):
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "gpt-4o")
    words = make_tokenizer(read_header(path), "m").backend_tokenizer.pre_tokenizer.pre_tokenize_str(
        "हिन्दी ÉTÉéÉ camelCase it's"
    )
    assert [(first, last) for _, (first, last) in words] == [
        (0, 6), (6, 11), (11, 12), (12, 18), (18, 22), (22, 27)
    ]  # fmt: skip


@pytest.mark.parametrize("text", llama_cpp.SENTENCEPIECE)
def test_sentencepiece_reads_what_llama_cpp_reads(tmp_path, text):
    path = gguf_files.write_sentencepiece(tmp_path / "m.gguf")
    expected = RECORDED["sentencepiece"][llama_cpp.SENTENCEPIECE.index(text)]
    assert ids(path, text, ends=True) == expected


def best_first(text: str, prefix: bool) -> list[int]:
    """SentencePiece's own way, spelled out: of all neighbours that make a token, the best score is joined first."""
    tokens, scores, _ = gguf_files.sentencepiece()
    parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        joined = [(scores[tokens.index(a + b)], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in tokens]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found: list[int] = []
    for part in parts:
        found += [tokens.index(part)] if part in tokens else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_the_best_score_first(tmp_path, prefix):
    path = gguf_files.write_sentencepiece(tmp_path / "m.gguf", add_space_prefix=prefix)
    for text in ("the other the", "  theothe  ", "thhethotther", "é12 121 née ♥\n", "hehe" * 9):
        assert ids(path, text) == best_first(text, prefix), text


@pytest.mark.parametrize(
    ("pre", "flags", "ends"),
    [
        ("smollm", {}, (False, False)),
        ("smollm", {"add_bos_token": True}, (True, False)),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("smollm", {"add_eos_token": True}, (False, True)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
    ],
)
def test_bos_and_eos_are_put_where_the_file_says(tmp_path, workspace, pre, flags, ends):
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", pre, **flags)
    tokenizer = through_workspace(path, workspace)
    plain = tokenizer("it's 12", add_special_tokens=False).input_ids
    bos, eos = (
        [number] * there for number, there in zip((tokenizer.bos_token_id, tokenizer.eos_token_id), ends, strict=True)
    )
    assert tokenizer("it's 12").input_ids == [*bos, *plain, *eos]
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<|start|>", "<|stop|>"]


def test_special_tokens_in_a_text_are_found_by_their_types(tmp_path, workspace):
    """Control, user-defined, and one that is control by its text alone; a normal token of the same look is text."""
    tokens, _ = gguf_files.trained()
    first = len(tokens)
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm")
    tokenizer = through_workspace(path, workspace)
    assert tokenizer("<|start|><|im_end|>[user]<|stop|>").input_ids == [first, first + 3, first + 2, first + 1]
    assert tokenizer.decode([first, first + 2], skip_special_tokens=True) == "[user]"
    types = [1] * (first + len(gguf_files.SPECIAL))
    other = gguf_files.write_byte_level(
        tmp_path / "n.gguf", "smollm", token_type=types, bos_token_id=None, eos_token_id=None
    )
    assert first not in ids(other, "<|start|>")


def test_ignored_merges_take_a_word_whole(tmp_path):
    """A token that no merges lead to, as Llama 3 has some."""
    tokens, merges = gguf_files.trained()
    made = {
        "tokens": [*tokens, "zqzq", "<|a|>"],
        "token_type": [1] * (len(tokens) + 2),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    for pre, whole in (("llama-bpe", True), ("dbrx", False)):
        path = gguf_files.write_byte_level(tmp_path / f"{pre}.gguf", pre, **made)
        assert (ids(path, "zqzq") == [len(tokens)]) is whole
    assert merges


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pre": "klingon"}, ["'klingon'", "not known here", "smollm"]),
        ({"pre": "kimi-k2"}, ["'kimi-k2'"]),
        ({"pre": None}, ["names no pre-tokenizer", "smollm"]),
        ({"pre": "default"}, ["'default'", "smollm"]),
        ({"pre": 7}, ["tokenizer.ggml.pre", "'7'"]),
        ({"model": "t5"}, ["'t5'", "gpt2", "llama"]),
        ({"model": "bert"}, ["'bert'"]),
        ({"model": "rwkv"}, ["'rwkv'"]),
        ({"model": None}, ["no tokenizer in it"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens"]),
        ({"merges": None}, ["tokenizer.ggml.merges"]),
        ({"merges": ["zz yy"]}, ["no token 'zz'"]),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, ["'a' twice"]),
        ({"token_type": [1, 3]}, ["2 values of tokenizer.ggml.token_type"]),
        ({"bos_token_id": 99999}, ["bos token 99999"]),
        ({"add_bos_token": True, "bos_token_id": None}, ["BOS token", "does not say which"]),
        ({"model": "llama"}, ["bytes"]),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, workspace, keys, words):
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", **{"pre": "smollm"} | keys)
    with pytest.raises(UnknownModel) as refused:
        gguf_folder(find_model(ModelSpec(id=str(path)), workspace), workspace)
    for word in ("m.gguf", *words):
        assert word in str(refused.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_is_refused(tmp_path, workspace, share):
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm")
    whole = path.read_bytes()
    header = len(whole) - len(whole) % 32
    path.write_bytes(whole[: int(header * share)])
    with pytest.raises(UnknownModel, match=r"m\.gguf"):
        load_config(find_model(ModelSpec(id=str(path)), workspace), workspace)


@pytest.mark.parametrize(("at", "value"), [(4, 1), (4, 9), (4, 3 << 24), (16, 2**60)])
def test_a_header_that_lies_is_refused(tmp_path, at, value):
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm")
    content = bytearray(path.read_bytes())
    struct.pack_into("<I" if at == 4 else "<Q", content, at, value)
    path.write_bytes(content)
    with pytest.raises(UnknownModel, match="can't be read"):
        read_header(path)


def test_the_header_is_what_the_package_gguf_reads(tmp_path):
    import gguf

    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm", scores=[0.5, -1.25], flags=[True, False])
    fields = gguf.GGUFReader(path).fields
    found = read_header(path)
    assert found == {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert found["tokenizer.ggml.scores"] == [0.5, -1.25]


def test_a_tokenizer_that_earlier_code_made_is_not_used(tmp_path, workspace):
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm")
    source = find_model(ModelSpec(id=str(path)), workspace)
    old = workspace.models / source.key / "gguf"
    old.mkdir(parents=True)
    (old / "tokenizer.json").write_text("not one")
    assert gguf_folder(source, workspace).name == FOLDER != "gguf"
    assert load_tokenizer(source, workspace)("1234").input_ids == ids(path, "1234")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", LISTING])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_folder_is_made_again(tmp_path, workspace, name, damage):
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm")
    source = find_model(ModelSpec(id=str(path)), workspace)
    folder = gguf_folder(source, workspace)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    whole = bytearray(before[name])
    whole[len(whole) // 2] ^= 4
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(bytes(whole) if damage == "flip" else before[name][:-9])
    assert gguf_folder(source, workspace) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == [FOLDER]


def test_files_beside_a_gguf_are_not_read(tmp_path, workspace):
    """A config, a tokenizer and code of another model in the same folder of downloads."""
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", "smollm")
    expected = ids(path, gguf_files.PLAIN)
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "hidden_size": 7} | code))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "Ġ", "tokenizer_class": "Evil"} | code))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "a"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"12": 0}))
    source = find_model(ModelSpec(id=str(path)), workspace)
    assert load_config(source, workspace).hidden_size == 32
    tokenizer = load_tokenizer(source, workspace)
    assert tokenizer(gguf_files.PLAIN).input_ids == expected
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|stop|>")
    assert not (tmp_path / "ran").exists()
