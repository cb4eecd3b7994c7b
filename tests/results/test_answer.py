"""The sentences of an answer."""

from __future__ import annotations

from outliers.results.answer import massive_words
from outliers.results.schema import MassiveRow, StudySummary


def summary(values: list[tuple[int, int, float]] | None, count: int | None) -> StudySummary:
    """Of massive activations (layer, feature, value)."""
    rows = (
        None
        if values is None
        else [MassiveRow.model_construct(layer=layer, feature=feature, value=value) for layer, feature, value in values]
    )
    return StudySummary.model_construct(massive=rows, massive_count=count)


def test_massive_activations_are_named_where_resid_was_read():
    assert massive_words(summary(None, None)) is None
    assert massive_words(summary([], 0)) == "no massive activation at resid"
    one = massive_words(summary([(2, 7, -1512.0)], 1))
    assert one == "1 massive activation at resid, the largest -1,512 in feature 7 at layer 2; feature: 7"
    many = [(layer, layer % 8, 100.0 + layer) for layer in range(20)]
    said = massive_words(summary(many, 4000))
    assert said == (
        "4,000 massive activations at resid, the largest 119 in feature 3 at layer 19; features of the largest 20: "
        "3, 2, 1, 0, 7, 6 and 2 more"
    )
