"""The page of a study: its key, its pictures, and a link where a browser can follow one."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from prefect.types.names import ArtifactKey
from pydantic import TypeAdapter

from flows.artifacts import page_key, study_page
from outliers.publish.outcome import Outcome
from outliers.publish.stores.links import HUB
from tests.support import results_folder
from tests.support.synthetic import prepared_for

PNG = b"\x89PNG\r\n\x1a\n and what a reader of the page draws"


@pytest.fixture(scope="module")
def prepared():
    return prepared_for({"resid": np.zeros((2, 3, 4, 8), np.float32)}, "float32")


def outcome(prepared, **changes) -> Outcome:
    known = {
        "study_id": prepared.study_id,
        "capture_id": prepared.capture_id,
        "title": prepared.title,
        "results": "/work/results/s",
        "report": "/work/results/s/report.html",
        "published": None,
        "published_bytes": 0,
        "systematic": [results_folder.feature(7, 33.75)],
        "cached": False,
    }
    return Outcome.model_validate(known | changes)


@pytest.mark.parametrize(
    ("title", "begins"),
    [
        ("SmolLM2-135M-Instruct 8x512", "smollm2-135m-instruct-8x512-"),
        ("Mein_Modell (β) v1.5 8x512", "mein-modell-v1-5-8x512-"),
        ("x" * 300, "x" * 60 + "-"),
        ("€€€", ""),
    ],
)
def test_a_key_is_one_that_prefect_takes_and_ends_with_the_study(prepared, title, begins):
    key = page_key(outcome(prepared, title=title), prepared)
    assert key.startswith(begins)
    assert key.endswith(prepared.study_id)
    TypeAdapter(ArtifactKey).validate_python(key)


def test_pictures_are_within_the_page_and_those_that_are_not_there_are_not_missed(prepared, tmp_path):
    assert "![" not in study_page(outcome(prepared), prepared, tmp_path)
    (tmp_path / "plots").mkdir()
    for name in ("heatmap", "layer_curves", "sweep"):
        (tmp_path / "plots" / f"{name}.png").write_bytes(PNG + name.encode())
    page = study_page(outcome(prepared), prepared, tmp_path)
    shown = [base64.b64decode(part.partition(")")[0]) for part in page.split("](data:image/png;base64,")[1:]]
    assert shown == [PNG + b"heatmap", PNG + b"layer_curves"]


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ("https://atlas.example.org/s/manifest.json", "](https://atlas.example.org/s/manifest.json)"),
        ("s3://atlas/my runs/s/manifest.json", "`outliers runs show 's3://atlas/my runs/s/manifest.json'`"),
        (
            "hf://datasets/lab/studies/my atlas #1/my-model/0123/manifest.json",
            f"]({HUB}/datasets/lab/studies/tree/main/my%20atlas%20%231/my-model/0123)",
        ),
        ("hf://datasets/lab/manifest.json", "`outliers runs show hf://datasets/lab/manifest.json`"),
        ("file:///atlas/s/manifest.json", "`outliers runs show file:///atlas/s/manifest.json`"),
        # what would end a link of Markdown early is no link
        (
            "https://atlas.example.org/s)[x](javascript:y",
            "`outliers runs show 'https://atlas.example.org/s)[x](javascript:y'`",
        ),
        (None, "`/work/results/s/report.html`"),
    ],
)
def test_what_a_browser_can_open_is_a_link_and_all_else_says_what_to_do(prepared, tmp_path, published, said):
    page = study_page(outcome(prepared, published=published), prepared, tmp_path)
    assert said in page
    assert ("](http" in page) == said.startswith("]")
    assert "`/work/results/s/report.html`" in page
