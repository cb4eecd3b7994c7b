"""Sequences of unequal length: a mask where they share a pass, and padding that nothing ever counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import zarr

from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.errors import CorpusError
from outliers.publish.outcome import make_outcome
from outliers.results.schema import Perplexity
from outliers.spec import StudySpec
from outliers.steps import run_analyze, run_report
from outliers.study.prepare import prepare
from tests.counting.test_counting import random_acts
from tests.support import oracle, synthetic, tiny
from tests.support.captured import stored
from tests.support.synthetic import Silent

LENGTH = 40


@pytest.fixture
def folder(tmp_path):
    """Documents shorter and longer than a sequence, one empty, one of a single token."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, size in enumerate((3, 60, 0, 17, 1, 40)):
        (texts / f"{number}.txt").write_text(("abcdefghij" * 6)[:size])
    return texts


def study_of(workspace, model, texts, sequences=5, **capture):
    spec = tiny.spec_for(model, texts, sequences, LENGTH, corpus={"packing": "documents"}, capture=capture)
    return prepare(StudySpec.model_validate(spec), workspace)


def test_a_document_is_a_sequence_and_its_padding_is_masked(tmp_path, workspace, folder):
    study = study_of(workspace, tiny.make_model(tmp_path / "model", add_bos=True), folder)
    corpus = load_corpus(study.corpus, workspace)
    assert sorted(corpus.lengths.tolist()) == [2, 4, 18, 40, 40]  # BOS, then the document, cut at 40
    assert study.corpus.num_tokens == 104
    assert study.corpus.num_documents == 5
    for row, length in enumerate(corpus.lengths):
        assert corpus.token_ids[row, 0] == 256
        assert "".join(corpus.piece(row, at) for at in range(length)) == corpus.sequence_texts[row]
        assert bytes(corpus.token_ids[row, 1:length].tolist())
        assert (corpus.token_ids[row, length:] == 257).all()


def test_too_few_documents_are_refused(tmp_path, workspace, folder):
    with pytest.raises(CorpusError, match="gives 5 documents; 6 sequences of one each were asked: ask for at most 5"):
        study_of(workspace, tiny.make_model(tmp_path / "model"), folder, sequences=6)


def test_packing_is_part_of_the_ids(tmp_path, workspace, folder):
    """The same ids cut at other places are another capture, even where the ids in a row are the same."""
    model = tiny.make_model(tmp_path / "model")
    seen = set()
    for sizes in ((3, 5), (4, 4), (5, 3)):
        texts = tmp_path / f"texts-{sizes[0]}"
        texts.mkdir()
        for name, size in zip(("0", "1"), sizes, strict=True):
            (texts / f"{name}.txt").write_text("a" * size)
        study = study_of(workspace, model, texts, sequences=2)
        seen.add((study.corpus.token_sha256, study.capture_id))
    assert len({token for token, _ in seen}) == 1
    assert len(seen) == 3


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Bloom", "Qwen3Next", "GptOss", "Mixtral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_has_the_values_it_has_alone(tmp_path, workspace, folder, family, batch):
    model_folder = tiny.make_model(tmp_path / "model", family)
    study = study_of(workspace, model_folder, folder, batch_sequences=batch, sites=("attn_in", "mlp_in", "resid"))
    extract(study, workspace, Silent())
    corpus = load_corpus(study.corpus, workspace)
    model = load_model(study.model, workspace, "cpu")
    group = zarr.open_group(workspace.capture(study.capture_id) / "activations.zarr", mode="r")
    assert group["mask"][:].sum(axis=1).tolist() == corpus.lengths.tolist() == group["lengths"][:].tolist()
    resid = stored(workspace, study, "resid")
    layers = model.get_submodule(study.model.anatomy.backbone).get_submodule(study.model.anatomy.layers)
    for row, length in enumerate(corpus.lengths):
        found = []

        def keep(_module, _args, out, into=found):
            into.append(out[0] if isinstance(out, tuple) else out)

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(corpus.token_ids[None, row, :length].astype(np.int64)))
        for hook in hooks:
            hook.remove()
        alone = torch.stack([tensor.reshape(length, -1) for tensor in found]).numpy()
        if batch == 1:
            np.testing.assert_array_equal(resid[:, row, :length], alone)
        else:  # rounding differs with the shape of a pass
            np.testing.assert_allclose(resid[:, row, :length], alone, rtol=2e-4, atol=2e-5)
        assert np.isnan(resid[:, row, length:]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chunk_positions", [20, 6])
def test_padding_is_never_counted(workspace, dtype, chunk_positions):
    """Against the oracle on the real tokens alone, laid out as one sequence; large values stand where padding is."""
    lengths = (20, 1, 13)
    acts, exact = random_acts(3, dtype, sites=("attn_in", "mlp_in", "resid"))
    for array in acts.values():
        for row, length in enumerate(lengths):
            array[:, row, length:] = synthetic.store(np.full((1,), 900.0), dtype)[0][0]
    criteria = {"layer_fraction": 0.5, "position_fraction": 0.15}
    prepared = synthetic.prepared_for(acts, dtype, criteria, lengths=lengths)
    chunk_bytes = chunk_positions * 6 * (4 if dtype == "float32" else 2)
    synthetic.write_capture(prepared, workspace, acts, chunk_bytes=chunk_bytes, lengths=lengths)
    summary, content = synthetic.study(prepared, workspace)
    assert summary.tokens == sum(lengths)
    real = {
        site: np.concatenate([values[:, row : row + 1, :length] for row, length in enumerate(lengths)], axis=2)
        for site, values in exact.items()
    }
    passed = 0
    for site, mask in oracle.hit_masks(real, 6.0).items():
        for reading, features in oracle.readings(mask, "0.5", "0.15").items():
            assert {f["feature"] for f in content["readings"][site][reading]} == features, (site, reading)
            passed += len(features)
    assert passed
    for row in content["layers"]:
        values = real[row["site"]][row["layer"]]
        assert row["nonfinite"] == np.count_nonzero(~np.isfinite(values))
        assert row["max_magnitude"] == np.abs(values[np.isfinite(values)]).max() < 900
        assert row["hits"] == np.count_nonzero(np.abs(np.nan_to_num(values, posinf=0, neginf=0)) >= 6.0)


def test_a_whole_study_of_documents(tmp_path, workspace, folder):
    study = study_of(workspace, tiny.make_model(tmp_path / "model"), folder, batch_sequences=2, perplexity=True)
    extract(study, workspace, Silent())
    run_analyze(study, workspace, Silent())
    run_report(study, workspace, Silent())
    content = json.loads((workspace.study(study.study_id) / "summary.json").read_text())
    assert content["corpus"]["num_tokens"] == study.corpus.num_tokens
    assert content["perplexity"]["tokens"] == study.corpus.num_tokens - 5
    assert content["perplexity"]["value"] > 1
    assert any("unequal lengths" in note for note in content["notes"])
    assert all(row["nonfinite"] == 0 for row in content["layers"])
    outcome = make_outcome(study, workspace, published=None, cached=False)
    low, high = content["intervals"]["counts"][study.site]["pooled"]
    sure = f"range over resamples of the sequences: {low if low == high else f'{low} to {high}'}"
    assert outcome.remarks() == [
        sure,
        f"perplexity {content['perplexity']['value']:.6g} (mean loss {content['perplexity']['loss']:.6f} nats a token), "
        f"over {study.corpus.num_tokens - 5} tokens",
    ]
    broken = outcome.model_copy(update={"nonfinite": 1200, "perplexity": Perplexity(value=None, loss=None, tokens=9)})
    assert [text.split(":")[0] for text in broken.remarks()] == [
        sure.split(":")[0],
        "perplexity not a number",
        "1,200 activations are not finite",
    ]
