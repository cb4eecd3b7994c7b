"""The command on the page asks for the same study: it is parsed by the command's own parser."""

from __future__ import annotations

import shlex

import pytest

from flows.cli.options import read_spec
from flows.cli.parser import build_parser
from outliers.report.reproduce import days, reproduce_command
from outliers.spec import StudySpec

SPECS = [
    {"model": {"id": "Qwen/Qwen3-0.6B"}},
    {
        "model": {"id": "org/m", "revision": "a" * 40, "dtype": "bfloat16", "quantization": "none"},
        "corpus": {
            "source": "org/data",
            "subset": "sample-10BT",
            "num_sequences": 3,
            "bos": "never",
            "packing": "documents",
        },
        "capture": {
            "sites": ["attn_in", "resid"],
            "layers": [0, 2],
            "perplexity": True,
            "site_modules": ["resid=a b$"],
        },
        "criteria": {
            "magnitude": 8.0,
            "layer_fraction": 0.5,
            "ladder": [2.0, 4.5],
            "site": "resid",
            "reading": "union",
        },
        "formats": {"formats": ["int8_token", "nvfp4"]},
        "label": "mine.v2",
    },
]


@pytest.mark.parametrize("wanted", SPECS)
def test_the_command_asks_for_the_same_study(wanted):
    spec = StudySpec.model_validate(wanted)
    command = reproduce_command(spec.model_dump(mode="json", exclude={"compute", "publish_to", "probe"}))
    words = shlex.split(command)
    assert words[:2] == ["outliers", "study"]
    found = read_spec(build_parser(words[1:]).parse_args(words[1:]))
    for part in ("model", "corpus", "capture", "criteria", "formats", "label"):
        assert getattr(found, part) == getattr(spec, part), part


def test_the_hash_of_a_folder_is_no_revision():
    """The revision of the built-in model and of folders is a hash of their files, which the command does not take."""
    for name in ("builtin:smollm2", "local:0123456789ab"):
        assert "--revision" not in reproduce_command({"model": {"id": name, "revision": "b" * 64}})


@pytest.mark.parametrize("spec", [None, {}, {"model": 3}, {"model": {"id": "a"}, "newer": 1}])
def test_what_is_no_spec_of_ours_gives_no_command(spec):
    assert reproduce_command(spec) is None


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([{"date": "2026-03-01"}], "2026-03-01"),
        ([{"date": "2026-03-04"}, {"date": "2026-03-01"}, {}], "2026-03-01 to 2026-03-04"),
        ([{"seconds": 3}], ""),  # recorded by an earlier version
        ([{"date": "<b>soon</b>"}, 7], ""),
        ("no list", ""),
    ],
)
def test_the_days_of_the_runs(runs, said):
    assert days({"extraction": runs}) == said
