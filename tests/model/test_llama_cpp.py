"""Many texts, against llama.cpp's own program: `make test-tokenizers` builds it and runs this; elsewhere it is skipped."""

from __future__ import annotations

import json
import os
import random
import unicodedata
from functools import partial
from pathlib import Path

import pytest

from outliers.corpus.hub_data import find_documents
from outliers.model.gguf_header import read_header
from outliers.model.gguf_tokenizer import make_tokenizer
from outliers.model.pretokenizers import PRE_TOKENIZERS
from outliers.model.source import find_model
from outliers.spec import CorpusSpec, ModelSpec
from tests.support import gguf_files, llama_cpp

PROGRAM = os.environ.get("OUTLIERS_TEST_TOKENIZERS", "")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="builds llama.cpp: make test-tokenizers")
judge = partial(llama_cpp.tokenize, PROGRAM)

BITS = (
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        "1",
        "23",
        "456",
        "7890",
        "a",
        "the",
        "The",
        "'s",
        "'LL",
        "'re",
        "!",
        "...",
        "==",
    ),
    *(
        "_",
        "-",
        "汉",
        "字",
        "日本",
        "ひ",
        "カ",
        "한국",
        "й",
        "Ж",
        "é",
        "😀",
        "👍🏽",
        "\u200d",
        "e\u0301",
        "हि",
        "नी",
        "\u00a0",
    ),
    *("\u3000", "\u2028", "xxxxxxxxxxxx", "\x00", "\x1f", "\x7f", "<|start|>", "[user]", "½", "٣", "<", "|", ">", "▁"),
)
ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]


def texts(number: int, length: int = 60) -> list[str]:
    """Random texts of BITS and of any character."""
    chosen = random.Random(number)
    return [
        "".join(chosen.choice(BITS if chosen.random() < 0.7 else ASSIGNED) for _ in range(chosen.randint(1, length)))
        for _ in range(number)
    ]


@pytest.fixture
def smollm2(workspace):
    path = Path(find_model(ModelSpec(id="builtin:smollm2"), workspace).path)
    return path, make_tokenizer(read_header(path), path.name)


def test_the_record_is_what_the_program_says(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "RECORDED", tmp_path / "ids.json")
    before = json.loads(Path(llama_cpp.__file__).with_name("llama_cpp_ids.json").read_text())
    llama_cpp.record(judge, smollm2[0])
    assert json.loads(llama_cpp.RECORDED.read_text()) == before


def test_the_demos_whole_corpus(smollm2):
    """Document by document, 113,000 tokens."""
    path, tokenizer = smollm2
    spec = CorpusSpec(source="builtin:python-docs")
    for text in find_documents(spec).texts(spec):
        assert tokenizer(text, add_special_tokens=False).input_ids == judge(path, text), text[:60]


def test_random_texts(smollm2):
    path, tokenizer = smollm2
    for text in texts(200):
        assert tokenizer(text, add_special_tokens=False).input_ids == judge(path, text), text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_random_texts_for_each_pre_tokenizer(tmp_path, pre):
    """In NFC for those that normalize; those whose pattern llama.cpp adapts are compared where the record says."""
    if pre in llama_cpp.ADAPTED:
        pytest.skip("llama.cpp adapts this pattern: letters that change case and marks are cut otherwise")
    path = gguf_files.write_byte_level(tmp_path / "m.gguf", pre)
    tokenizer = make_tokenizer(read_header(path), path.name)
    for text in texts(30, 200):
        read = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
        if pre == "deepseek-llm":  # its class of signs holds this blank, and llama.cpp's engine has one for all blanks
            read = read.replace("\u3000", "")
        assert tokenizer(read).input_ids == judge(path, read, True), read


def test_random_texts_for_sentencepiece(tmp_path):
    path = gguf_files.write_sentencepiece(tmp_path / "m.gguf")
    tokenizer = make_tokenizer(read_header(path), path.name)
    for text in texts(100):
        assert tokenizer(text).input_ids == judge(path, text, True), text
