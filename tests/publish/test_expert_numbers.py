"""Experts of a real capture to the end: their tables at the boundary and in the digest, the page, the terminal, the atlas.

The model is a tiny DeepSeek V3: a dense layer, two layers of four routed experts and a shared one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import re

import pyarrow as pa
import pytest
import torch
from rich.console import Console

from flows.cli.answers import Answers
from flows.cli.run_experts import show_reach
from flows.cli.run_show import read_run, show_command
from outliers.api.studies import open_study
from outliers.atlas.row import row_of
from outliers.capture.extract import extract
from outliers.errors import BadInput, ForbiddenFile
from outliers.experts.totals_files import read_totals
from outliers.files.parquet import parquet_bytes, read_parquet
from outliers.publish.allowlist import EXPERTS, PICTURES, ROUTER, SUMMARY, check_numbers, read_numbers
from outliers.publish.manifest import digest_of
from outliers.publish.received import asked_of, check_received
from outliers.publish.reporting import numbers_folder, write_numbers, write_study
from outliers.publish.shelf import Published
from outliers.results.schema import EXPERTS_NULLABLE, EXPERTS_SCHEMA, ROUTER_SCHEMA
from outliers.results.write import json_bytes
from outliers.steps import run_analyze
from outliers.workspace import open_workspace
from tests.support import expert_oracle, tiny
from tests.support.captured import prepared
from tests.support.synthetic import Silent


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(prepared, workspace, the bytes of its numbers by name)."""
    folder = tmp_path_factory.mktemp("mixture")
    expert_oracle.build("DeepseekV3", "eager", torch.float32).save_pretrained(folder / "model")
    tiny.save_tokenizer(folder / "model")
    (folder / "book.txt").write_text("Tokens go to experts; some more than others. " * 200)
    workspace = open_workspace(folder / "workspace")
    asked = {"batch_sequences": 2, "sites": ("attn_in", "mlp_in", "resid")}
    criteria = {"magnitude": 1.0}
    made = prepared(
        workspace, str(folder / "model"), folder / "book.txt", sequences=3, length=16, capture=asked, criteria=criteria
    )
    extract(made, workspace, Silent())
    run_analyze(made, workspace, Silent())
    write_numbers(made, workspace, Silent())
    files = dict(read_numbers(numbers_folder(made, workspace)).files)
    write_study(made, workspace, Silent())
    return made, workspace, files


def test_the_tables_are_numbers_of_the_study(study):
    made, workspace, files = study
    assert asked_of(made) == (EXPERTS, ROUTER, PICTURES)
    numbers = check_received(files, made, workspace)
    assert dict(numbers.files) == files
    block = numbers.summary["experts"]
    assert (block["layers"], block["experts"], block["slots"], block["shared"]) == ([1, 2], 4, 2, 1)
    table = read_parquet(files[EXPERTS])
    assert table.num_rows == 10 and table.schema.equals(EXPERTS_SCHEMA)
    assert read_parquet(files[ROUTER]).schema.equals(ROUTER_SCHEMA)
    totals = read_totals(workspace.summary(made.capture_id, made.study_id))
    assert table["tokens"].to_pylist() == totals.tokens.ravel().tolist()
    assert {file for file in files if file.endswith("parquet")} == {"features.parquet", EXPERTS, ROUTER}


def test_a_number_of_them_changes_the_digest_but_not_what_is_attributed(study):
    _, _, files = study
    seen = {digest_of(files)}
    for name, column in ((EXPERTS, "tokens"), (EXPERTS, "output_max"), (ROUTER, "entropy"), (ROUTER, "margin_p50")):
        table = read_parquet(files[name])
        seen.add(digest_of(files | {name: parquet_bytes(put(table, column, 0, table[column][0].as_py() + 1))}))
    seen.add(digest_of(changed(files, lambda block: block["reach"].pop())))
    assert len(seen) == 6
    moved = changed(files, lambda block: block["attribution"][0]["layers"][0].update(block_squares=1.5))
    assert moved[SUMMARY] != files[SUMMARY] and digest_of(moved) == digest_of(files)


def put(table, name, row, value):
    cells = table[name].to_pylist()
    cells[row] = value
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(cells, table.schema.field(index).type))


def unreached(table, row):
    """The table where an expert has no token but kept its values."""
    for name in ("tokens", "first_tokens", "delimiter_tokens", "special_tokens"):
        table = put(table, name, row, 0)
    return table


def changed(files, change):
    summary = json.loads(files[SUMMARY])
    change(summary["experts"])
    return files | {SUMMARY: json_bytes(summary)}


LATER = [
    (EXPERTS, lambda t: t.append_column("extra", t["tokens"]), "columns"),
    (EXPERTS, lambda t: t.slice(0, 9), "has 9 rows, 10 are due"),
    (EXPERTS, lambda t: pa.concat_tables([t.slice(1), t.slice(0, 1)]), "in another order"),
    (EXPERTS, lambda t: put(t, "layer", 0, 0), "rows of other experts"),
    (EXPERTS, lambda t: put(t, "tokens", 0, 1_000), "has 1,000 tokens"),
    (EXPERTS, lambda t: put(t, "tokens", 0, t["tokens"][0].as_py() - 1), "that its tokens do not give"),
    (EXPERTS, lambda t: put(t, "tokens", 0, None), "nulls in the column tokens"),
    (EXPERTS, lambda t: put(put(t, "tokens", 1, 0), "first_tokens", 1, 0), "of expert 1 of layer 1"),
    (EXPERTS, lambda t: unreached(t, 1), "a value of expert 1 of layer 1, which no token reached"),
    (EXPERTS, lambda t: put(t, "first_tokens", 0, 49), "more of a kind"),
    (EXPERTS, lambda t: put(t, "load", 0, 2.5), "a load of expert 0 of layer 1"),
    (EXPERTS, lambda t: put(t, "load_low", 0, 9.0), "not valid"),
    (EXPERTS, lambda t: put(t, "weight_sum", 0, float("nan")), "not finite"),
    (EXPERTS, lambda t: put(t, "hits", 0, -1), "-1 hits"),
    (EXPERTS, lambda t: put(t, "output_max", 0, -1.0), "not a place of this model"),
    (EXPERTS, lambda t: put(t, "output_channel", 0, 1 << 20), "not a place of this model"),
    (EXPERTS, lambda t: put(t, "output_sequence", 0, 3), "not a place of this model"),
    (EXPERTS, lambda t: put(t, "output_position", 0, None), "without its place"),
    (EXPERTS, lambda t: put(t, "output_first", 0, 1e9), "above output_max"),
    (EXPERTS, lambda t: put(t, "super_expert", 4, False), "has super_expert False"),
    (EXPERTS, lambda t: put(t, "super_expert", 0, None), "has super_expert None"),
    (EXPERTS, lambda t: put(t, "super_expert", 0, not t["super_expert"][0].as_py()), "the bounds in summary.json"),
    (ROUTER, lambda t: t.slice(0, 1), "has 1 rows, 2 are due"),
    (ROUTER, lambda t: put(t, "layer", 0, 2), "rows of other layers"),
    (ROUTER, lambda t: put(t, "tokens", 0, 49), "has 49 tokens"),
    (ROUTER, lambda t: put(t, "entropy", 0, 0.5), "an entropy of layer 1"),
    (ROUTER, lambda t: put(t, "entropy", 0, float("inf")), "not finite"),
    (ROUTER, lambda t: put(t, "entropy_low", 0, 1.5), "not valid"),
    (ROUTER, lambda t: put(t, "at_most_10", 0, 77), "not those of experts.parquet"),
    (ROUTER, lambda t: put(t, "busiest_load", 0, 3.0), "another busiest expert"),
    (ROUTER, lambda t: put(t, "margin_p01", 0, 5.0), "not in order"),
    (ROUTER, lambda t: put(t, "outputs_floor", 0, -1.0), "an outputs_floor"),
    (ROUTER, lambda t: t.replace_schema_metadata({"activations": b"x" * 70_000}), "metadata"),
]


@pytest.mark.parametrize(("name", "change", "word"), LATER)
def test_another_table_is_refused(study, name, change, word):
    _, _, files = study
    with pytest.raises(ForbiddenFile) as refused:
        check_numbers(files | {name: parquet_bytes(change(read_parquet(files[name])))})
    assert str(refused.value).startswith(f"{name} ") and word in str(refused.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda b: b.update(layers=[0, 1]), "of layer 2 was not read"),
        (lambda b: b.update(layers=[1, 9]), "was not read"),
        (lambda b: b.update(experts=5), "the model has 4"),
        (lambda b: b.update(never_reached=0.5), "never_reached"),
        (lambda b: b["coverage"][1].update(experts=0), "coverage"),
        (lambda b: b["coverage"].pop(), "coverage is not of"),
        (lambda b: b["super_experts"].update(percentile=1e-9), "the bounds in summary.json give"),
        (lambda b: b["super_experts"].update(percentile="much"), "percentile"),
        (lambda b: b["super_experts"].update(count=9), "listed"),
        (lambda b: b["largest_output"].update(sequence=99), "not in the corpus"),
        (lambda b: b["largest_output"].update(expert=4), "expert 4 of layer"),
        (lambda b: b["largest_output"].update(token="x" * 500), "token"),
        (lambda b: b["attribution"].append(copy.deepcopy(b["attribution"][0])), "there twice"),
        (lambda b: b["attribution"][0]["layers"][0]["shares"].append(0.5), "shares"),
        (lambda b: b["attribution"][0].update(feature=100_000), "not systematic"),
        (lambda b: b["kinds"][0].update(kind="secret"), "kind"),
        (lambda b: b.update(secret=1), "secret"),
    ],
)
def test_another_part_of_the_summary_is_refused(study, change, word):
    with pytest.raises(ForbiddenFile) as refused:
        check_numbers(changed(study[2], change))
    assert word in str(refused.value)


def test_the_tables_and_the_summary_go_together_and_are_of_what_was_asked(study):
    made, workspace, files = study
    for name in (EXPERTS, ROUTER):
        with pytest.raises(ForbiddenFile, match=rf"{name} is missing"):
            check_numbers({key: data for key, data in files.items() if key != name})
    summary = json.loads(files[SUMMARY])
    del summary["experts"]
    with pytest.raises(ForbiddenFile, match=r"summary\.json says nothing of it"):
        check_numbers(files | {SUMMARY: json_bytes(summary)})
    bare = {name: data for name, data in files.items() if name not in (EXPERTS, ROUTER)}
    with pytest.raises(ValueError, match="says nothing of experts"):
        check_received(bare | {SUMMARY: json_bytes(summary)}, made, workspace)
    with pytest.raises(ValueError, match="the study asks for"):
        check_received(changed(files, lambda block: block.update(weights_inside=True)), made, workspace)
    lied = changed(files, lambda block: block["largest_output"].update(token="leak"))
    with pytest.raises(ValueError, match="text"):
        check_received(lied, made, workspace)


def shown(workspace, **options):
    out = io.StringIO()
    asked = {"run": None, "json": False, "site": None, "layer": None, "feature": None, "formats": False, "expert": None}
    with contextlib.redirect_stdout(out):
        show_command(workspace, argparse.Namespace(**asked | options), Console(stderr=True))
    return out.getvalue()


def test_the_terminal_the_page_and_python_show_them(study):
    made, workspace, files = study
    row = read_parquet(files[EXPERTS]).to_pylist()[2]
    for named in ("1.2", "L1E2"):
        text = shown(workspace, expert=named)
        assert f"L1E2 of {made.model.source.id}" in text and f"{row['tokens']} of 48" in text
        assert f"largest abs(x) {row['output_max']:.6g} at channel {row['output_channel']}" in text
    assert "shared expert L1S0" in shown(workspace, expert="1.-1")
    for wrong, word in (
        ("0.1", "layers with experts are 1-2"),
        ("1.4", "experts 0 to 3, and -1 to -1"),
        ("x", "such as 1.68"),
    ):
        with pytest.raises(BadInput, match=word):
            shown(workspace, expert=wrong)
    assert "of 8 experts reached by no token" in shown(workspace)
    (found,) = json.loads(shown(workspace, expert="2.0", json=True))["experts"]
    assert (found["layer"], found["expert"]) == (2, 0)
    folder = workspace.study(made.study_id)
    page = (folder / "report.html").read_text()
    assert (
        re.search(r"<h2[^>]*>Experts</h2>", page)
        and "Super experts, as published" in page
        and "Who gives a feature" in page
    )
    assert {"experts_load.png", "experts_output.png"} <= {path.name for path in (folder / "plots").iterdir()}
    opened = open_study(str(folder))
    assert opened.experts().shape[0] == 10 and opened.router().shape[0] == 2
    assert len(read_run(made.study_id, workspace).experts) == 10


def test_the_atlas_has_three_columns_of_them(study):
    made, workspace, files = study
    manifest = json.loads((workspace.study(made.study_id) / "manifest.json").read_text())
    row = row_of(Published(url="x", manifest=manifest, files=files))
    block = json.loads(files[SUMMARY])["experts"]
    assert row.experts_unreached == block["never_reached"]
    assert row.super_experts == block["super_experts"]["count"]
    assert row.largest_expert_output == block["largest_output"]["output"]


def test_a_plan_says_how_many_tokens_would_reach_every_expert(study):
    made, workspace, files = study
    out = io.StringIO()
    console = Answers(file=out)
    show_reach(console, workspace, "another/model")
    assert out.getvalue() == ""
    show_reach(console, workspace, made.model.source.id)
    reach = json.loads(files[SUMMARY])["experts"]["reach"]
    assert [row["times"] for row in reach] == [1, 100]
    for row in reach:
        said = "unknown, for some" if row["tokens"] is None else f"about {row['tokens']:,} tokens"
        assert f"{'once' if row['times'] == 1 else '100 times'}: {said}" in out.getvalue()
    assert f"by the routing of 48 tokens in study {made.study_id}" in out.getvalue()


def test_a_corpus_without_tokens_is_refused_not_divided_by(study):
    _, _, files = study
    summary = json.loads(files[SUMMARY])
    summary["corpus"]["num_tokens"] = 0
    table = read_parquet(files[EXPERTS])
    for row in range(table.num_rows):
        table = unreached(table, row)
    for name in EXPERTS_NULLABLE:
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), pa.nulls(10, table.schema.field(index).type))
    with pytest.raises(ForbiddenFile):
        check_numbers(files | {SUMMARY: json_bytes(summary), EXPERTS: parquet_bytes(table)})
