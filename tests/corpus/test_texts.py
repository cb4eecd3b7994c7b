"""A corpus that is written sequence by sequence: the bytes of json and numpy, whatever a text holds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.corpus.ids import CorpusInfo, TokenNames, load_corpus, token_hash
from outliers.corpus.texts import TextsWriter
from outliers.corpus.writer import CorpusWriter
from outliers.workspace import open_workspace

AWKWARD = st.text(st.sampled_from('"\\, []a\u2028é😀\x00'), max_size=12) | st.sampled_from(['", "', '\\"', '\\\\", "'])


@settings(max_examples=80, deadline=None)
@given(st.lists(AWKWARD, min_size=1, max_size=6))
def test_texts_are_written_as_json_writes_them(items):
    with tempfile.TemporaryDirectory() as place:
        writer = TextsWriter(Path(place) / "texts.json")
        for text in items:
            writer.add(text)
        writer.close()
        assert (Path(place) / "texts.json").read_bytes() == json.dumps(items).encode()


def test_a_corpus_is_written_as_numpy_writes_arrays(tmp_path):
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
    np.testing.assert_array_equal(found.token_ids, padded)
    assert found.lengths.tolist() == lengths
    assert found.sequence_texts == tuple("x" * length for length in lengths)
    assert sorted(path.name for path in workspace.corpora.iterdir()) == ["k"]
