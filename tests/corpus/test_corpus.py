"""Text to ids: joined, cut without overlap, the same on every machine; every character of a token findable again."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outliers.corpus.tokens import load_corpus, prepare_corpus
from outliers.errors import CorpusError, UnknownModel
from outliers.model.source import find_model
from outliers.spec import CorpusSpec, ModelSpec
from tests.support import tiny

EOS = 257


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"plain": tiny.make_model(folder / "plain"), "bos": tiny.make_model(folder / "bos", add_bos=True)}


@pytest.fixture
def texts(tmp_path):
    """A folder for texts, apart from the workspace."""
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def corpus(workspace, models, source, kind="plain", **spec):
    model = find_model(ModelSpec(id=models[kind]), workspace)
    info = prepare_corpus(CorpusSpec.model_validate({"source": str(source), **spec}), model, workspace)
    return load_corpus(info, workspace)


def byte_ids(text):
    """The byte-level tokenizer of `tiny`, by hand: an id a byte, in the order of its alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}
    return [alphabet.index(symbol[b]) for b in text.encode()]


def test_documents_are_joined_by_eos_and_cut_without_overlap(workspace, models, texts):
    written = {"a.txt": "first document", "b.md": "second — ünïcode", "c.rst": "third"}
    for name, text in written.items():
        (texts / name).write_text(text)
    (texts / "picture.bin").write_bytes(b"\xff\x00")
    found = corpus(workspace, models, texts, num_sequences=3, sequence_length=11)
    stream = found.token_ids.ravel().tolist()
    orders = []
    for order in itertools.permutations(written):
        joined = [number for name in order for number in (*byte_ids(written[name]), EOS)]
        orders.append(joined[: len(stream)])
    assert stream in orders
    assert found.info.num_tokens == 33
    assert not found.info.public
    assert found.info.source.startswith("local:")


def test_pieces_tile_the_text(workspace, models, texts):
    (texts / "t.txt").write_text("ab “cd” — ef\n" * 20)
    found = corpus(workspace, models, texts / "t.txt", num_sequences=4, sequence_length=40)
    for row, text in enumerate(found.sequence_texts):
        assert "".join(found.piece(row, position) for position in range(40)) == text
    whole = "".join(found.sequence_texts)
    assert ("ab “cd” — ef\n" * 20).startswith(whole)


def test_bos_begins_every_sequence_where_the_tokenizer_would(workspace, models, texts):
    (texts / "t.txt").write_text("abcdefghij" * 10)
    plain = corpus(workspace, models, texts / "t.txt", num_sequences=2, sequence_length=10)
    auto = corpus(workspace, models, texts / "t.txt", kind="bos", num_sequences=2, sequence_length=10)
    never = corpus(workspace, models, texts / "t.txt", kind="bos", num_sequences=2, sequence_length=10, bos="never")
    always = corpus(workspace, models, texts / "t.txt", num_sequences=2, sequence_length=10, bos="always")
    assert auto.token_ids[:, 0].tolist() == always.token_ids[:, 0].tolist() == [256, 256]
    assert (auto.token_ids == always.token_ids).all()
    assert (plain.token_ids == never.token_ids).all()
    assert auto.sequence_texts == ("abcdefghi", "jabcdefgh")
    assert plain.sequence_texts == ("abcdefghij", "abcdefghij")


def test_seed_chooses_the_order_and_nothing_else_does(workspace, models, texts):
    for number in range(9):
        (texts / f"{number}.txt").write_text(str(number) * 30)
    one, again, other = (
        corpus(workspace, models, texts, num_sequences=5, seed=seed, sequence_length=30) for seed in (1, 1, 2)
    )
    assert one.info.token_sha256 == again.info.token_sha256 != other.info.token_sha256
    # pinned, by sha256sum of "1:0.txt" and so on: the same order on any machine, in any version of Python
    assert list(dict.fromkeys(re.sub("[^0-9]", "", "".join(one.sequence_texts)))) == ["2", "4", "5", "0", "7"]


def test_python_docs_need_no_network(workspace, models):
    found = corpus(workspace, models, "builtin:python-docs", num_sequences=4, sequence_length=2048)
    assert found.info.public
    assert found.info.source == "builtin:python-docs"
    assert len(set(found.sequence_texts)) == 4


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_in_files_is_read_as_the_hubs_are(workspace, models, texts, kind):
    rows = [{"text": f"document number {n}, with some words in it", "n": n} for n in range(50)]
    if kind == "jsonl":
        (texts / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), texts / "rows.parquet")
    found = corpus(workspace, models, texts, num_sequences=5, sequence_length=40)
    assert "document number" in "".join(found.sequence_texts)
    other = corpus(workspace, models, texts, num_sequences=5, sequence_length=40, seed=5)
    assert found.info.token_sha256 != other.info.token_sha256


def test_a_data_set_without_text_is_refused(workspace, models, texts):
    (texts / "rows.jsonl").write_text(json.dumps({"body": "x"}))
    with pytest.raises(CorpusError, match="no column 'text'; its columns: body"):
        corpus(workspace, models, texts, num_sequences=1, sequence_length=4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:wikipedia", "built in: builtin:python-docs"),
        ("/no/such/file", "there is no text at"),
        ("notes.txt", "there is no text at"),
        ("Some/dataset", "the hub is switched off"),
    ],
)
def test_sources_that_are_not_there(workspace, models, source, message):
    with pytest.raises(CorpusError, match=message):
        corpus(workspace, models, source, num_sequences=1, sequence_length=4)


def test_too_few_tokens_says_both_numbers(workspace, models, texts):
    (texts / "t.txt").write_text("x" * 100)
    with pytest.raises(CorpusError, match=r"gives 100 tokens; 4 sequences of 32 need 128: ask for at most 3 sequences"):
        corpus(workspace, models, texts / "t.txt", num_sequences=4, sequence_length=32)


def test_not_text_and_empty_folder_are_refused(workspace, models, texts):
    (texts / "t.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(CorpusError, match="is not UTF-8 text"):
        corpus(workspace, models, texts / "t.txt", num_sequences=1, sequence_length=4)
    (texts / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds no text"):
        corpus(workspace, models, texts / "empty", num_sequences=1, sequence_length=4)


def test_ids_that_changed_on_disk_are_noticed(workspace, models, texts):
    (texts / "t.txt").write_text("x" * 100)
    found = corpus(workspace, models, texts / "t.txt", num_sequences=2, sequence_length=10)
    path = workspace.corpora / found.info.key / "token_ids.npy"
    ids = np.load(path)
    ids[0, 0] += 1
    np.save(path, ids)
    with pytest.raises(CorpusError, match="hash to"):
        load_corpus(found.info, workspace)
    shutil.rmtree(path.parent)
    with pytest.raises(CorpusError, match="run the study again"):
        load_corpus(found.info, workspace)


SHAPES = {
    "a flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "empty": lambda _: b"",
    "gone": None,
}


@pytest.mark.parametrize("damage", SHAPES)
@pytest.mark.parametrize(
    "name",
    ["token_ids.npy", "lengths.npy", "starts.npy", "sequence_texts.json", "token_names.json", "corpus.json"],
)
def test_what_the_workspace_holds_is_refused_where_it_changed_and_made_again(workspace, models, texts, name, damage):
    (texts / "t.txt").write_text("ab 龍. " * 40)
    asked = {"num_sequences": 2, "sequence_length": 10}
    first = corpus(workspace, models, texts / "t.txt", kind="bos", **asked)
    ids, starts, said = first.token_ids, first.starts[:], first.sequence_texts
    folder = workspace.corpora / first.info.key
    path = folder / name
    if SHAPES[damage] is None:
        path.unlink()
    else:
        path.write_bytes(SHAPES[damage](path.read_bytes()))
    with pytest.raises(CorpusError, match="run the study again"):
        load_corpus(first.info, workspace)
    again = corpus(workspace, models, texts / "t.txt", kind="bos", **asked)
    assert again.info == first.info
    assert (again.token_ids == ids).all()
    assert (again.starts[:] == starts).all()
    assert again.sequence_texts == said
    assert again.names == first.names
    assert [path.name for path in workspace.corpora.iterdir()] == [folder.name]


def test_a_file_in_the_place_of_a_corpus_and_an_old_corpus_are_replaced(workspace, models, texts):
    (texts / "t.txt").write_text("x" * 100)
    asked = {"num_sequences": 2, "sequence_length": 10}
    first = corpus(workspace, models, texts / "t.txt", **asked)
    folder = workspace.corpora / first.info.key
    (folder / "corpus.json").write_text(first.info.model_dump_json())  # as version 1 wrote it
    assert corpus(workspace, models, texts / "t.txt", **asked).info == first.info
    shutil.rmtree(folder)
    folder.write_text("in the way")
    assert corpus(workspace, models, texts / "t.txt", **asked).info == first.info


def test_special_tokens_and_parts_of_characters_are_no_delimiters(workspace, models, texts):
    (texts / "t.txt").write_text("龍馬。😀, a\n" * 9)
    found = corpus(workspace, models, texts / "t.txt", kind="bos", num_sequences=1, sequence_length=22)
    # BOS; 3 bytes for each of 龍, 馬, 。; 4 of the emoji; then `,`, a blank, `a`, a newline
    assert [position for position in range(22) if found.delimiters()[0, position]] == [14, 15, 17]
    assert np.flatnonzero(found.specials()[0]).tolist() == [0]
    shown = [found.shown(0, position) for position in range(22)]
    assert shown[:4] == ["<s>", "<0xE9>", "<0xBE>", "<0x8D>"]
    assert shown[14:18] == [",", " ", "a", "\n"]
    assert found.sequence_texts[0].startswith("龍馬。😀, a\n")
    both = found.marks()
    assert both.shape == (1, 5, 22)
    assert (both[:, 0] == found.delimiters()).all()
    assert (both[:, 1] == found.specials()).all()
    assert np.flatnonzero(both[0, 3]).tolist() == [16], "`a` begins a word; the bytes of 龍 are of no kind"
    assert both[0, :, 1:14].sum() == 0


def test_the_text_around_a_token_has_whole_characters(workspace, models, texts):
    from types import SimpleNamespace

    from outliers.results.top_tokens import context

    (texts / "t.txt").write_text("ab龍cd" * 9)
    found = corpus(workspace, models, texts / "t.txt", kind="bos", num_sequences=1, sequence_length=20)
    seen = [context(SimpleNamespace(text=True), found, 0, position) for position in range(6)]
    text = found.sequence_texts[0]
    assert seen[0] == {"token": "<s>", "before": "", "after": text[:60]}
    assert seen[1] == {"token": "a", "before": "", "after": text[1:61]}
    for place, byte in ((3, "E9"), (4, "BE"), (5, "8D")):
        assert seen[place] == {"token": f"<0x{byte}>", "before": "ab", "after": text[2:62]}


def test_padding_is_no_special_token(workspace, models, texts):
    (texts / "t.txt").write_text("abc")
    found = corpus(workspace, models, texts, kind="bos", num_sequences=1, sequence_length=9, packing="documents")
    assert found.token_ids[0, 4:].tolist() == [EOS] * 5
    assert np.flatnonzero(found.specials()[0]).tolist() == [0]


def test_a_prefix_as_long_as_the_sequence_is_refused(workspace, texts, tmp_path):
    from tests.corpus.test_tokenizing import with_template

    source, ids = with_template(tmp_path, "[gMASK] <sop> $A")
    (texts / "t.txt").write_text("abcdefgh")
    with pytest.raises(CorpusError, match="begins a text with 2 tokens, and a sequence has 2"):
        prepare_corpus(CorpusSpec(source=str(texts), num_sequences=1, sequence_length=2), source, workspace)
    info = prepare_corpus(CorpusSpec(source=str(texts), num_sequences=2, sequence_length=5), source, workspace)
    found = load_corpus(info, workspace)
    assert found.token_ids[:, :2].tolist() == [[ids["[gMASK]"], ids["<sop>"]]] * 2
    assert found.sequence_texts == ("abc", "def")
    assert found.specials()[:, :3].tolist() == [[True, True, False]] * 2


def test_ids_beyond_the_embedding_are_refused_also_of_a_corpus_that_is_there(workspace, models, texts):
    (texts / "t.txt").write_text("abcdefgh")
    source = find_model(ModelSpec(id=models["bos"]), workspace)
    spec = CorpusSpec(source=str(texts), num_sequences=1, sequence_length=5)
    for _ in range(2):
        with pytest.raises(UnknownModel, match="gives the id 256, and the model's embedding ends at 255"):
            prepare_corpus(spec, source, workspace, vocab_size=256)
        assert prepare_corpus(spec, source, workspace, vocab_size=257).num_tokens == 5  # 257 itself is not used


def test_a_bad_corpus_is_told_before_the_model_is_looked_at(workspace, texts):
    from outliers.spec import StudySpec
    from outliers.study.prepare import prepare

    (texts / "t.txt").write_bytes("Größe".encode("latin-1"))
    spec = tiny.spec_for("/there/is/no/model", texts / "t.txt")
    with pytest.raises(CorpusError, match="is not UTF-8 text"):
        prepare(StudySpec.model_validate(spec), workspace)


def test_a_long_text_file_gives_the_ids_of_the_whole(workspace, models, texts):
    line = "A sentence about 37 things — 龍, and so on.\n"
    (texts / "t.txt").write_text(line * 40_000)
    found = corpus(workspace, models, texts / "t.txt", num_sequences=4, sequence_length=300)
    assert found.token_ids.ravel().tolist() == byte_ids(line * 40)[:1200]
