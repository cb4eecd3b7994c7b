"""Perplexity of a capture that was made without it: its losses are measured first, and never a part of them taken for all."""

from __future__ import annotations

import math

import pytest

from outliers.errors import CaptureError
from outliers.results.write import load_findings, perplexity, summarize_study
from outliers.steps import capture_exists, run_analyze, run_extract
from outliers.workspace import open_workspace
from tests.support.captured import prepared
from tests.support.synthetic import Silent


def test_a_capture_without_losses_is_extracted_again(tmp_path, llama, text):
    workspace = open_workspace(tmp_path)
    plain = prepared(workspace, llama, text)
    run_extract(plain, workspace, Silent())
    study = prepared(workspace, llama, text, capture={"perplexity": True})
    assert study.capture_id == plain.capture_id
    assert capture_exists(plain, workspace) and not capture_exists(study, workspace)

    run_analyze(study, workspace, Silent())
    with pytest.raises(CaptureError, match=r"the losses of 0 of \d+ tokens were measured"):
        summarized(study, workspace)

    run_extract(study, workspace, Silent())
    assert capture_exists(study, workspace)
    run_analyze(study, workspace, Silent())
    found = summarized(study, workspace).perplexity
    assert found.tokens == study.corpus.num_sequences * (study.corpus.sequence_length - 1)
    assert math.isclose(found.value, math.exp(found.loss), rel_tol=1e-12)


def summarized(study, workspace):
    from outliers.corpus.tokens import load_corpus

    private = workspace.summary(study.capture_id, study.study_id)
    return summarize_study(study, load_findings(study, private), load_corpus(study.corpus, workspace))


def test_no_second_token_is_no_perplexity():
    assert perplexity(0.0, 0).model_dump() == {"value": None, "loss": None, "tokens": 0}
