"""What the probe of a published study adds to its row of the atlas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from outliers.results.schema import Advice
from outliers.spec.formats import bits_of, is_format


def best_advice(given: Sequence[bytes], study_id: str) -> Advice | None:
    """The verdict of the probe of a study that tried most, of several; None without one. That of another study is left out."""
    found = []
    for data in given:
        try:
            advice = Advice.model_validate_json(data, extra="ignore")
        except ValidationError:
            continue
        if advice.study_id == study_id:
            found.append(advice)
    return max(found, key=lambda advice: (len(advice.formats), len(advice.causes), advice.probe_id), default=None)


def verdict_columns(given: Sequence[bytes], study_id: str) -> dict[str, Any]:
    """The columns of a study's probe, that of `best_advice`."""
    best = best_advice(given, study_id)
    if best is None:
        return {}
    kls = {item.format: item.confirmed_kl for item in best.formats if item.weights is None}
    fit = [
        (bits_of(item.format), item.confirmed_kl or 0.0, item.format)
        for item in best.formats
        # a newer program may know other formats, whose bits are not known here
        if item.verdict in ("within", "indistinguishable") and item.weights is None and is_format(item.format)
    ]
    zeroed = [cause.perplexity for cause in best.causes if (cause.kind, cause.what) == ("zero", "systematic")]
    return {
        "probe_id": best.probe_id,
        "best_format": min(fit)[2] if fit else None,
        "budget": best.budget,
        "int8_kl": kls.get("int8_token"),
        "nvfp4_kl": kls.get("nvfp4"),
        "perplexity_without_features": zeroed[0] if zeroed else None,
    }
