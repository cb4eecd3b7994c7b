"""The block for a model card: its YAML is what the hub's own library reads, its Markdown holds the study's numbers.

The command to reproduce is read back by the parser of the command itself.
"""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard

from flows.cli.options import read_spec
from flows.cli.parser import build_parser
from outliers.advice.advise import advise
from outliers.report.card import make_card
from outliers.results.schema import StudySummary
from outliers.spec import StudySpec
from tests.support.atlas_store import EVIL, MODELS, bare, study
from tests.support.probed import change, probes


def card(summary, spec=None, advice=None, url=None):
    return make_card(StudySummary.model_validate(summary), bare(summary, spec).manifest, advice, url)


def asked_again(text):
    """The StudySpec that the card's command asks for, as the command line reads it."""
    words = shlex.split(re.search(r"```sh\n(.*?)\n```", text, re.S)[1])[1:]
    return read_spec(build_parser(words).parse_args(words))


def test_the_hub_reads_its_front_matter():
    made = card(study(2, MODELS[2], features=4, perplexity=13.0, massive=812), url="https://hub.example/datasets/a/b")
    data = ModelCard(made.text).data
    assert data.tags == ["outlier-features", "activation-outliers"]
    results = {item.metric_type: item for item in data.eval_results}
    assert {name: item.metric_value for name, item in results.items()} == {
        "systematic_outlier_features": 4,
        "largest_systematic_magnitude": 40.0,
        "massive_activations": 812,
        "perplexity": 13.0,
    }
    assert {item.dataset_type for item in data.eval_results} == {"HuggingFaceFW/fineweb-edu"}
    assert results["perplexity"].source_url == "https://hub.example/datasets/a/b"
    # read for a study, and no training data
    assert "datasets" not in yaml.safe_load(made.front_matter)


def test_a_store_that_no_browser_opens_is_not_linked():
    made = card(study(2, MODELS[2]), url="s3://bucket/atlas/a/b")
    assert "s3://" not in made.text
    assert "source" not in yaml.safe_load(made.front_matter)["model-index"][0]["results"][0]


SPECS = [
    {"model": "a/b"},
    {
        "model": {"id": "a/b", "revision": "c" * 40, "dtype": "float16", "quantization": "none"},
        "corpus": {
            "source": "c/d",
            "subset": "s",
            "num_sequences": 3,
            "packing": "documents",
            "seed": 7,
            "bos": "never",
        },
        "capture": {"sites": ["mlp_in", "resid"], "layers": [0, 3, 5], "experts": "routing", "perplexity": True},
        "criteria": {"magnitude": 4.5, "site": "mlp_in", "reading": "union", "ladder": []},
        "formats": {"formats": ["int8_token", "nvfp4"]},
        "label": "again",
        "publish_text": "none",
    },
    {"model": "x y/z'", "capture": {"site_modules": ["attn_in=layers.*.a b", "mlp_in=layers.*.mlp:input"]}},
]


@pytest.mark.parametrize("spec", SPECS)
def test_its_command_asks_for_the_same_study(spec):
    spec = StudySpec.model_validate(spec)
    public = spec.model_dump(mode="json", exclude={"compute", "publish_to", "probe"})
    assert asked_again(card(study(1, MODELS[0]), public).text) == spec


def test_a_manifest_that_does_not_say_what_was_asked():
    made = card(study(1, MODELS[0], magnitude=5.0, site="attn_in", reading="affected", corpus=("a/b", 3, 64)))
    assert "The manifest does not say what was asked for" in made.body
    spec = asked_again(made.text)
    assert (spec.model.id, spec.model.dtype, spec.corpus.num_sequences, spec.criteria.magnitude) == (
        MODELS[0][0],
        "bfloat16",
        3,
        5.0,
    )
    assert "split" not in made.front_matter


def test_own_files_are_named_by_their_hash_alone():
    own = study(9, ("local:0123456789ab", None, None, None, 12, 768), corpus=("local:ba9876543210", 2, 64))
    spec = StudySpec.model_validate(
        {"model": {"id": "local:0123456789ab", "revision": "0" * 64}, "corpus": "local:ba9876543210"}
    )
    made = card(own, spec.model_dump(mode="json", exclude={"compute", "publish_to", "probe"}))
    assert "`local:0123456789ab`" in made.body
    assert "--model ./YOUR-MODEL" in made.body
    assert "--corpus ./YOUR-TEXT" in made.body
    assert "--revision" not in made.body


def test_the_answer_and_its_table():
    body = card(study(1, MODELS[4], features=23, layers=0.4)).body
    assert (
        "**23 systematic outlier features** by the reading `pooled` at `block`: abs(x) ≥ 6 in at least 25% of" in body
    )
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% to ([\d.]+)% \| 97% \|$", body, re.M
    )
    assert rows[0] == ("7", "40", "40", "10", "8", "11")
    assert len(rows) == 20
    assert "and 3 smaller ones" in body
    assert "| feature |" not in card(study(1, MODELS[4], features=0)).body


def test_the_verdict_of_a_probe():
    made = probes(
        change("int8", format="int8_token", kl=0.03),
        change("fp4", format="nvfp4", weights="nvfp4", kl=0.4),
        study_id="1" * 16,
    )
    advice = advise(made, [], 0.05)
    text = card(study(int("1" * 16, 16), MODELS[0]), advice=advice)
    assert "### What can be quantized" in text.body
    assert re.search(r"\| `int8_token` \| as they are \| 0.03 \(0.027 to 0.033\) \| 16\.48 \| within \|", text.body)
    assert re.search(r"\| `nvfp4` \| `nvfp4` \| 0.4 ", text.body)
    assert f"`{advice.probe_id}`" in text.body
    kl = [item for item in ModelCard(text.text).data.eval_results if item.metric_type == "kl_divergence"]
    assert sorted(item.metric_value for item in kl) == [0.03, 0.4]


def test_markup_in_names_stays_text():
    evil = study(1, (EVIL, 1.0, 1.0, None, 16, 1024), corpus=(EVIL, 2, 64))
    evil["model"] |= {"architecture": EVIL, "revision": EVIL, "quantization": EVIL}
    evil["notes"] = [f"{EVIL}\n---\ntags: [a]", "[a](javascript:alert(1))"]
    made = card(evil, {"label": EVIL})
    content = yaml.safe_load(made.front_matter)
    assert content["model-index"][0]["name"] == EVIL
    assert set(content) == {"tags", "model-index"}
    assert "\n---\n" not in made.body
    outside = re.sub(r"(`+)(?:.|\n)*?\1", "", made.body)  # what no code span holds is rendered
    assert "<script" not in outside
    assert "<img" not in outside
    assert "](javascript" not in outside


def test_equal_studies_give_equal_cards():
    assert card(study(1, MODELS[0])).text == card(json.loads(json.dumps(study(1, MODELS[0])))).text
