"""Pages and pictures of numbers that others chose: text stays text, odd numbers give a page or a refusal."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from outliers.errors import ForbiddenFile, OutliersError
from outliers.files.parquet import parquet_bytes
from outliers.publish.allowlist import check_numbers
from outliers.publish.publishable import render_files
from tests.security.pages import Tags, files_of
from tests.support import results_folder

SCRIPT = "<!doctype html><script>document.title = 'pwned'</script>"
ACTIVATIONS = np.random.default_rng(5).normal(size=50_000).astype(np.float32).tobytes()
EVIL = (
    "<script>document.title='pwned'</script>",
    "x\" onload=\"document.title='pwned'",
    "javascript:document.title='pwned'",
    "a$\\frac{1}{0}$b$",
    "a\u202eb\u2066c",
    "a\x1b[31mb\x00c",
    "</title><svg/onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
)


def numbers_of(summary, tokens=None, features=None):
    files = {"summary.json": summary, "tokens.json": tokens or results_folder.tokens()}
    made = {name: json.dumps(content).encode() for name, content in files.items()}
    return check_numbers(made | {"features.parquet": parquet_bytes(features or results_folder.features())})


def named(text):
    """A study in which every free text is `text`, as far as the schema takes it."""
    summary, tokens = results_folder.summary(), results_folder.tokens()
    summary["model"] |= {"id": f"a{text}".replace("\\", "/"), "revision": text, "architecture": text, "dtype": text}
    summary["corpus"] |= {"source": f"a{text}".replace("\\", "/"), "publish_text": text}
    summary["notes"] = [text]
    tokens["features"][0]["top"][0] |= {"token": text, "before": text, "after": text}
    return numbers_of(summary, tokens)


def test_hostile_texts_are_text(tmp_path):
    """The same tags with the same attributes as of an honest study, and plots that are drawn: TeX is not read."""
    pages = {
        text: render_files(named(text), {text: text})["report.html"].decode() for text in ("plain", " ".join(EVIL))
    }
    expected = Tags(pages["plain"])
    assert [name for name, _ in expected.names].count("img") == 6
    for text, page in pages.items():
        found = Tags(page)
        tags = [name for name in found.names if name[0] != "wbr"]  # where a name may break
        assert tags == [name for name in expected.names if name[0] != "wbr"], text
        assert all(value.startswith(("data:image/webp;base64,", "#")) for value in found.loads), text
        assert not {"\u202e", "\u2066", "\x1b", "\x00"} & set(page), text
        assert (
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'" in page
        )


def _big(summary):
    for row in summary["layers"]:
        row |= {"max_magnitude": 1e308, "kurtosis": 1.7e308, "quantiles": [1e-300, 1e308], "median_magnitude": -1e308}
    for row in summary["systematic"]:
        row |= {"max_magnitude": 1e308, "min": -1e308, "max": 1e308, "hits": 2**63 - 1, "first_token_hits": 2**63 - 1}


def _counts(summary):
    summary["histogram"]["attn_in"]["counts"] = [2**63 - 1] * 3
    summary["sweep"]["counts"]["block"]["pooled"] = [2**63 - 1, 0, 5]
    summary["corpus"] |= {"num_sequences": 2**63 - 1, "num_tokens": 2**63 - 1, "sequence_length": 0}


def _nothing(summary):
    summary |= {"layers": [], "systematic": [], "histogram": {}, "readings": {}, "notes": []}
    summary["corpus"] |= {"num_sequences": 0, "num_tokens": 0, "sequence_length": 0}


def _odd(summary):
    summary["criteria"] |= {"magnitude": -1.0, "layer_fraction": 0.0, "position_fraction": 0.0, "reading": "per_layer"}
    summary |= {"quantile_levels": [0.5], "without_first_tokens": {}}
    summary["histogram"]["attn_in"] |= {"lower_edges": [-5.0, -1.0, 0.0]}


def _zero(summary):
    summary["criteria"]["magnitude"] = 0.0
    summary["sweep"]["magnitudes"] = [-1.0, 0.0, 1e308]


@pytest.mark.parametrize("change", [_big, _counts, _nothing, _odd, _zero])
def test_numbers_that_no_model_gives_make_a_page_or_a_refusal(change):
    """Never a traceback, and in bounded time."""
    summary = results_folder.summary()
    change(summary)
    began = time.monotonic()
    features = results_folder.features().slice(0, 0) if change is _nothing else None
    try:
        files = render_files(numbers_of(summary, features=features), {})
    except OutliersError as error:
        assert isinstance(error, ForbiddenFile)
    else:
        assert sum(map(len, files.values())) < 4_000_000
    assert time.monotonic() - began < 120


def test_a_few_bytes_of_a_table_do_not_stand_for_any_number_of_rows():
    schema, rows = results_folder.features().schema, 2_000_000
    constant = {"string": "block", "list<item: int64>": [], "list<element: int64>": []}
    columns = [pa.array([constant.get(str(field.type), 1)], field.type).take(pa.array([0] * rows)) for field in schema]
    data = parquet_bytes(pa.Table.from_arrays(columns, schema=schema))
    assert len(data) < 200_000
    summary = results_folder.summary()
    summary["model"] |= {"num_layers": 1024, "hidden_size": 1 << 17}
    files = {"summary.json": json.dumps(summary).encode(), "tokens.json": json.dumps(results_folder.tokens()).encode()}
    with pytest.raises(ForbiddenFile, match="2,000,000 rows"):
        check_numbers(files | {"features.parquet": data})


def test_equal_numbers_are_rendered_to_equal_bytes_in_every_process(tmp_path):
    folder = results_folder.make_results(tmp_path / "results")
    program = (
        "import sys, hashlib; from pathlib import Path; from outliers.publish.allowlist import read_numbers\n"
        "from outliers.publish.publishable import render_files\n"
        "spec = {'model': {'id': 'Qwen/Qwen3-0.6B'}}\n"
        "for path, data in sorted(render_files(read_numbers(Path(sys.argv[1])), {'seconds': 1.5}, spec=spec).items()):\n"
        "    print(path, hashlib.sha256(data).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "svg", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, text=True, check=True
    )
    expected = [
        f"{path} {hashlib.sha256((folder / path).read_bytes()).hexdigest()}"
        for path in sorted(files_of(folder))
        if path.startswith(("plots/", "report"))
    ]
    assert done.stdout.splitlines() == expected
