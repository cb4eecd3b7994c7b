"""What is cited is what a study uses, and each entry is BibTeX."""

from __future__ import annotations

import re

from outliers.results.citations import citations
from outliers.results.schema import Advice, StudySummary
from tests.support import results_folder


def numbers(entries: tuple[str, ...]) -> list[str]:
    """The arXiv number of each entry, whose braces must match."""
    for entry in entries:
        assert re.match(r"@(inproceedings|article)\{\w+,\n", entry) and entry.count("{") == entry.count("}"), entry
    return [re.findall(r"\d{4}\.\d{5}", entry)[0] for entry in entries]


def test_what_is_cited_is_what_was_counted():
    summary = StudySummary.model_validate(results_folder.summary())
    layers = [row.model_copy(update={"mean_inf_norm": 1.0}) for row in summary.layers]
    bare = summary.model_copy(update={"massive": None, "experts": None})
    assert numbers(citations(bare))[0] == "2208.07339"
    assert not {"2402.17762", "2507.23279", "2411.07191"} & set(numbers(citations(bare)))
    assert "2306.12929" in numbers(citations(bare.model_copy(update={"layers": layers})))
    assert "2402.17762" in numbers(citations(bare.model_copy(update={"massive": []})))


def test_super_weights_are_cited_where_a_probe_named_one():
    class Cause:
        kind = "weight"

    summary = StudySummary.model_validate(results_folder.summary())
    assert "2411.07191" in numbers(citations(summary, Advice.model_construct(causes=[Cause()])))
    assert "2411.07191" not in numbers(citations(summary, Advice.model_construct(causes=[])))
