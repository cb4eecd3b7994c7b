"""Which names of runs are Prefect's own, and may be replaced: the words of its server, and those that its form proposes."""

from __future__ import annotations

import pytest
from prefect.utilities.names import generate_slug

from flows.run_names import described, is_generated, reap_name, study_name, sweep_name
from outliers.spec import StudySpec


def test_every_name_that_the_server_makes_is_known():
    assert [name for name in (generate_slug(2) for _ in range(2000)) if not is_generated(name)] == []


@pytest.mark.parametrize(
    "name",
    # as they stood in the form's field
    ["theta65-harvey-e", "rho4-kora", "alpha2-andromedae-void", "pi-canis-majoris-z", "xi873-rigel", "mu-barad-dur"],
)
def test_a_name_that_the_form_proposes_is_known(name):
    assert is_generated(name)


@pytest.mark.parametrize(
    "name",
    [
        "nightly",
        "my own name",
        "llama-3-8b",
        "alpha-llama",  # begins as the form's do
        "lambda-test",
        "rigel",
        "rho4-kora-again",
        "happy",
        "happy-path",  # an adjective of the server's
        "happy-jackal-2",
        "Happy-Jackal",
        "study model 3x32 book.txt",
        "",
        "-",
    ],
)
def test_a_name_of_a_persons_own_stays(name):
    assert not is_generated(name)


@pytest.mark.parametrize(
    ("model", "corpus", "title"),
    [
        ("builtin:smollm2", "builtin:python-docs", "SmolLM2-135M-Instruct 16x2048 python-docs"),
        ("Qwen/Qwen3-30B-A3B", {"num_sequences": 8, "sequence_length": 512}, "Qwen3-30B-A3B 8x512 fineweb-edu"),
        ("/models/mine/", {"source": "/texts/book.txt"}, "mine 16x2048 book.txt"),
    ],
)
def test_a_study_is_described_by_its_model_shape_and_corpus(model, corpus, title):
    assert described(StudySpec.model_validate({"model": model, "corpus": corpus})) == title


@pytest.mark.parametrize("named", [study_name, sweep_name, reap_name])
def test_every_flow_keeps_a_name_that_was_given(monkeypatch, named):
    # what Prefect has for tests of functions that read the run
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "mine, of {today}")
    assert named() == "mine, of {today}"


@pytest.mark.parametrize(("named", "made"), [(sweep_name, "sweep of 0"), (reap_name, "reap")])
def test_a_name_of_prefects_is_replaced(monkeypatch, named, made):
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "happy-jackal")
    assert named() == made
