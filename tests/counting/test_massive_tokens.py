"""The token of a massive activation is the one that a person reads, in every file: BOS by its name, never an empty text."""

from __future__ import annotations

import json

import torch
import transformers

from outliers.steps import run_analyze, run_extract, run_report
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.synthetic import Silent


def _model(folder):
    """A tiny model with massive activations at BOS and at the first byte of 龍."""
    tiny.make_model(folder, add_bos=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    first_byte = tokenizer.encode("龍", add_special_tokens=False)[0]
    with torch.no_grad():
        for number in (256, first_byte):
            model.model.embed_tokens.weight[number, 3] = 9000.0
    model.save_pretrained(folder)
    return str(folder)


def test_summary_and_report_name_what_the_text_does_not_show(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("龍 flies, " * 60)
    workspace = open_workspace(tmp_path / "workspace")
    capture = {"sites": ("attn_in", "mlp_in", "resid")}
    study = prepared(workspace, _model(tmp_path / "model"), text, capture=capture, publish_text="context")
    for step in (run_extract, run_analyze, run_report):
        step(study, workspace, Silent())
    folder = workspace.study(study.study_id)
    summary, tokens = (json.loads((folder / name).read_text()) for name in ("summary.json", "tokens.json"))
    assert {row["token"] for row in summary["massive"]} == {"<s>", "<0xE9>"}
    place = ("layer", "sequence", "position", "feature")
    shown = {tuple(row[key] for key in place): row["token"] for row in tokens["massive"]}
    listed = {tuple(row[key] for key in place): row["token"] for row in summary["massive"]}
    assert shown and shown.items() <= listed.items()
    assert "&lt;s&gt;" in (folder / "report.html").read_text()
