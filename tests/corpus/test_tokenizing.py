"""What a tokenizer puts before a text, the first ids of a long text, the names of tokens, and tokenizers that can't be used."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import transformers
from tokenizers import AddedToken, processors

from outliers.corpus.tokenizing import Encoder
from outliers.errors import CorpusError, UnknownModel
from tests.support import tiny
from tests.support.tokenizer_kinds import KINDS, byte_fallback, hard_text, save


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ids_of_a_long_text_are_those_of_the_whole(tmp_path, workspace, kind):
    """Windows far smaller than the product's, so that every text is cut in places."""
    source = save(KINDS[kind](), tmp_path / "it")
    encoder = Encoder(source, workspace, first_characters=1200, ahead_characters=500)
    library = transformers.AutoTokenizer.from_pretrained(source.path)
    shorter = 0
    for seed in range(16):
        text = hard_text(seed, 8000)
        whole = library(text, add_special_tokens=False).input_ids
        needed = random.Random(seed).randrange(1, 500)
        found = encoder.encode(text, needed)
        assert found.ids == whole[: len(found.ids)], (seed, needed)
        assert len(found.ids) >= min(needed, len(whole))
        assert text.startswith("".join(found.pieces))
        shorter += len(found.ids) < len(whole)
    assert shorter > 8, "hardly a text was cut: nothing was tried"


@pytest.mark.parametrize("kind", ["GPT-2", "Unigram, unsplit", "WordPiece", "digits from the right"])
@pytest.mark.parametrize("run", [" ", "a", "7", "ab", "\u0301"])
def test_a_run_without_a_boundary_is_never_cut(tmp_path, workspace, kind, run):
    encoder = Encoder(save(KINDS[kind](), tmp_path / "it"), workspace, first_characters=600, ahead_characters=200)
    for length in (2001, 2002, 2003):
        text = "the quick " + run * length + " fox. " + "the end " * 20
        whole = encoder.encode(text, 10**9)
        found = encoder.encode(text, 5)
        assert found.ids == whole.ids[: len(found.ids)]
        assert found.pieces == whole.pieces[: len(found.pieces)]


def with_template(tmp_path, template, **options):
    tiny.save_tokenizer(tmp_path / "plain")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    names = ["[gMASK]", "<sop>", "[SEP]"]
    fast.add_special_tokens({"additional_special_tokens": names})
    backend = fast.backend_tokenizer
    numbers = [(name, fast.convert_tokens_to_ids(name)) for name in (*names, "<s>", "</s>")]
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return save(backend, tmp_path / "it", **({"bos_token": "<s>", "eos_token": "</s>"} | options)), dict(numbers)


@pytest.mark.parametrize(
    ("template", "auto", "always"),
    [
        ("[gMASK] <sop> $A", ["[gMASK]", "<sop>"], ["[gMASK]", "<sop>"]),  # GLM
        ("<sop> $A", ["<sop>"], ["<sop>"]),  # not its bos
        ("<s> $A", ["<s>"], ["<s>"]),
        ("<s> $A </s>", ["<s>"], ["<s>"]),  # what comes after a text is not a part of it
        ("$A [SEP]", [], ["<s>"]),
        (None, [], ["<s>"]),
    ],
)
def test_a_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path, workspace, template, auto, always):
    source, ids = with_template(tmp_path, template)
    encoder = Encoder(source, workspace)
    assert encoder.prefix("auto") == tuple(ids[name] for name in auto)
    assert encoder.prefix("always") == tuple(ids[name] for name in always)
    assert encoder.prefix("never") == ()


def test_always_without_a_bos_is_refused(tmp_path, workspace):
    source, _ = with_template(tmp_path, None, bos_token=None)
    with pytest.raises(CorpusError, match="has no BOS token"):
        Encoder(source, workspace).prefix("always")


def test_names_of_special_tokens_and_of_parts_of_characters(tmp_path, workspace):
    source, ids = with_template(tmp_path, "[gMASK] <sop> $A")
    encoder = Encoder(source, workspace)
    found = encoder.encode("a龍.", 99)
    assert found.pieces == ["a", "", "", "龍", "."]
    names = encoder.names([ids["<sop>"], ids["</s>"], *found.ids], ["", "", *found.pieces])
    assert names.special == {ids["<sop>"]: "<sop>", ids["</s>"]: "</s>"}
    assert [names.fragments.get(number) for number in found.ids] == [None, "<0xE9>", "<0xBE>", "<0x8D>", None]
    assert not names.unseen


def test_merged_bytes_and_byte_fallback_have_their_bytes(tmp_path, workspace):
    encoder = Encoder(save(byte_fallback(), tmp_path / "fallback"), workspace)
    found = encoder.encode("the 鬱", 99)
    assert found.pieces[-3:] == ["", "", "鬱"]
    names = encoder.names(found.ids, found.pieces)
    assert [names.fragments.get(number) for number in found.ids[-3:]] == ["<0xE9>", "<0xAC>", "<0xB1>"]
    # a byte that is a character by itself is not one
    line = encoder.encode("the\x0bfox", 99)
    assert "<0x0B>" in [encoder.tokenizer.convert_ids_to_tokens(number) for number in line.ids]
    assert not encoder.names(line.ids, line.pieces).fragments
    merged = Encoder(save(KINDS["GPT-2"](), tmp_path / "merged"), workspace)
    found = merged.encode("鬱", 99)
    shown = merged.names(found.ids, found.pieces).fragments
    held = bytes(int(part, 16) for number in found.ids for part in shown[number].strip("<>").split())
    assert held.decode() == "鬱"


def test_a_character_that_becomes_several_tokens_is_no_delimiter(tmp_path, workspace):
    """NFKC: `㎞` becomes `k` and `m`, of which the text shows one."""
    encoder = Encoder(save(KINDS["Metaspace, Unigram, NFKC"](), tmp_path / "it"), workspace)
    found = encoder.encode("㎞", 9)
    names = encoder.names(found.ids, found.pieces)
    assert "".join(found.pieces) == "㎞"
    assert "k" in names.unseen.values() or any("k" in text for text in names.unseen.values()) or len(found.ids) == 1


_BROKEN = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
DAMAGE = {
    "cut in the middle": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "a list": lambda _: "[]",
    "no JSON": lambda _: "version https://git-lfs.github.com/spec/v1",
    "a merge of tokens that are not there": lambda text: text.replace('"merges": []', '"merges": [["qq", "zz"]]'),
    "a pattern that is not valid": lambda text: json.dumps(
        json.loads(text) | {"pre_tokenizer": _BROKEN}
    ),
    "an id of a special token that is text": lambda text: text.replace("256", '"x"'),
    "no model": lambda text: json.dumps({name: part for name, part in json.loads(text).items() if name != "model"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_is_refused_in_the_librarys_words(tmp_path, workspace, damage):
    source = save(_plain(tmp_path), tmp_path / "it", bos_token="<s>", eos_token="</s>")
    path = tmp_path / "it" / "tokenizer.json"
    path.write_text(DAMAGE[damage](path.read_text()))
    with pytest.raises(UnknownModel, match="the tokenizer of it"):
        Encoder(source, workspace).prefix("auto")


def _plain(tmp_path):
    tiny.save_tokenizer(tmp_path / "plain")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "plain").backend_tokenizer


def test_a_tokenizer_without_a_fast_version_is_refused(tmp_path, workspace):
    source = save(_plain(tmp_path), tmp_path / "it")
    shutil.rmtree(tmp_path / "it")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "it")
    (tmp_path / "it" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnknownModel, match="has no fast version"):
        Encoder(source, workspace)


def test_a_tokenizer_that_leaves_out_merges_at_random_is_refused(tmp_path, workspace):
    source = save(_plain(tmp_path), tmp_path / "it")
    path = tmp_path / "it" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(UnknownModel, match='gives other tokens each time: set "dropout" to null'):
        Encoder(source, workspace)


def test_no_tokenizer_at_all_is_refused(tmp_path, workspace):
    source = save(_plain(tmp_path), tmp_path / "it")
    for file in (tmp_path / "it").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UnknownModel, match=r"the tokenizer of it .*needs the model's own tokenizer\.json"):
        Encoder(source, workspace)


def test_an_added_token_is_found_across_a_cut(tmp_path, workspace):
    backend = _plain(tmp_path)
    backend.add_tokens([AddedToken("fox jumps over", lstrip=True, normalized=False)])
    encoder = Encoder(save(backend, tmp_path / "it"), workspace, first_characters=400, ahead_characters=300)
    for pad in range(40):
        text = "x" * pad + " and " * 60 + "  fox jumps over " * 30
        whole, found = encoder.encode(text, 10**9), encoder.encode(text, 3)
        assert found.ids == whole.ids[: len(found.ids)]
