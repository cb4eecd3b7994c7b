"""Texts on the disk: the bytes of json and numpy, read back one at a time, whatever a text holds and wherever a block ends."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.corpus import texts as module
from outliers.corpus.ids import CorpusInfo, TokenNames, load_corpus, token_hash
from outliers.corpus.texts import Texts, write_texts
from outliers.corpus.writer import CorpusWriter
from outliers.workspace import open_workspace

AWKWARD = st.text(st.sampled_from('"\\, []a\u2028é😀\x00'), max_size=12) | st.sampled_from(['", "', '\\"', '\\\\", "'])


@settings(max_examples=80, deadline=None)
@given(st.lists(AWKWARD, min_size=1, max_size=6), st.sampled_from([1, 2, 3, 7, 64, 1 << 20]))
def test_texts_are_what_json_reads(items, block):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        path = Path(place) / "texts.json"
        write_texts(path, items)
        assert path.read_bytes() == json.dumps(items).encode()
        patch.setattr(module, "_BLOCK_BYTES", block)
        found = Texts(path)
        assert found == items
        assert (len(found), found[-1], found[1:3]) == (len(items), items[-1], tuple(items[1:3]))
        assert found != [*items, "more"]


@pytest.mark.parametrize("content", [b'["a', b'["a", "b"', b'["a"] x', b'{"a": 1}', b""])
def test_a_file_that_is_no_list_of_texts_is_refused(tmp_path, content):
    (tmp_path / "texts.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"texts\.json"):
        Texts(tmp_path / "texts.json")


def test_a_corpus_is_written_as_numpy_writes_arrays(tmp_path):
    """And read from the disk: what a part of it took of the memory can be given back."""
    workspace, rng = open_workspace(tmp_path / "ws"), np.random.default_rng(0)
    lengths = [5, 3, 1, 5]
    ids = [rng.integers(0, 50, length).astype(np.int32) for length in lengths]
    padded = np.full((4, 5), 9, np.int32)
    with CorpusWriter(workspace, 4, 5, fill=9) as writer:
        for row, own in enumerate(ids):
            padded[row, : len(own)] = own
            writer.add(own, np.arange(len(own), dtype=np.int32), "x" * len(own))
        facts = {
            "source": "s",
            "public": True,
            "key": "k",
            "num_documents": 1,
            "num_sequences": 4,
            "sequence_length": 5,
        }
        info = CorpusInfo.model_validate(facts | {"num_tokens": writer.num_tokens} | writer.hashes)
        assert writer.largest_id == padded.max()
        writer.finish(info, TokenNames(special={9: "<nine>"}))
    assert info.token_sha256 == token_hash(padded, np.array(lengths))
    np.save(tmp_path / "wanted.npy", padded)
    assert (workspace.corpora / "k" / "token_ids.npy").read_bytes() == (tmp_path / "wanted.npy").read_bytes()
    found = load_corpus(info, workspace)
    for _ in range(2):
        np.testing.assert_array_equal(found.token_ids, padded)
        assert found.lengths.tolist() == lengths
        assert list(found.sequence_texts) == ["x" * length for length in lengths]
        found.release()
    assert sorted(path.name for path in workspace.corpora.iterdir()) == ["k"]
