"""Rows that are read from their files when they are asked for, against numpy and json on the whole file."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.corpus import rows as module
from outliers.corpus.rows import RowFile, TextRows
from outliers.errors import CorpusError

anything = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('"\\,[]\n')), max_size=40)


def saved(path, values):
    np.save(path, np.asarray(values, np.int32))
    return path


def test_rows_are_those_of_numpy(tmp_path):
    values = np.random.default_rng(0).integers(-(2**31), 2**31, (700, 900)).astype(np.int32)
    seen: list[np.ndarray] = []
    found = RowFile(saved(tmp_path / "a.npy", values), seen.append)
    assert len(seen) > 1 and (np.concatenate(seen) == values).all()
    assert found.shape == values.shape
    for chosen in (slice(0, 1), slice(3, 650), slice(699, 900), slice(5, 5), slice(9, 2), slice(-2, None), slice(None)):
        assert (found[chosen] == values[chosen]).all() and found[chosen].shape == values[chosen].shape
    with pytest.raises(ValueError, match="every 2th"):
        found[::2]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(anything, max_size=30), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_texts_are_those_of_json(tmp_path_factory, texts, indent, ascii_only):
    path = tmp_path_factory.mktemp("texts") / "texts.json"
    path.write_text(json.dumps(texts, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    found = TextRows(path)
    assert [found[number] for number in range(len(found))] == texts
    with pytest.raises(IndexError):
        found[len(texts)]


def test_a_text_over_blocks_of_the_file(tmp_path):
    block = module.BLOCK_BYTES
    texts = ["a" * (block - 3), '\\"' * 700_000, "", "é" * 300_000, "end"]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    found = TextRows(path)
    assert [found[number] for number in range(len(found))] == texts


@pytest.mark.parametrize(
    "content", ['{"a": "b"}', '["a", 1]', '["a"', '["a" "b"', '"a"', "", '["a"] ["b"]', "[1, 2]", '["a]']
)
def test_what_is_no_list_of_strings_is_refused(tmp_path, content):
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(ValueError):
        TextRows(path)


@pytest.mark.parametrize(
    "values", [np.zeros((2, 3), np.int64), np.zeros(4, np.int32), np.asfortranarray(np.zeros((2, 3), np.int32))]
)
def test_an_array_of_another_kind_is_refused(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="not rows of int32"):
        RowFile(tmp_path / "a.npy")


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = saved(tmp_path / "a.npy", np.arange(40).reshape(8, 5))
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(["one", "two", "three"]))
    found, words = RowFile(path), TextRows(texts)
    with path.open("r+b") as file:
        file.seek(-20, 2)
        file.write(b"\1")
    texts.write_text(json.dumps(["one", "twO", "three"]))
    assert found[:7].tolist() == np.arange(35).reshape(7, 5).tolist() and words[0] == "one"
    with pytest.raises(CorpusError, match="changed while it was read"):
        found[6:8]
    with pytest.raises(CorpusError, match="changed while it was read"):
        words[1]
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CorpusError, match="ends before"):
        found[:]


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = saved(tmp_path / "a.npy", np.zeros((4_000, 2_048), np.int32))  # 33 MB
    texts = tmp_path / "texts.json"
    # 20 MB, and 2.4 MB of escapes: what is not ASCII is written as such
    texts.write_text(json.dumps(["word " * 4_000] * 1_000 + ["é" * 400_000]))
    tracemalloc.start()
    found, words = RowFile(path), TextRows(texts)
    assert found[3_999:].shape == (1, 2_048) and len(words[999]) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6, peak
