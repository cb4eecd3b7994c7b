"""A probe's numbers made by hand: changes with chosen KLs, and a small map."""

from __future__ import annotations

from outliers.results.schema import Change, Gate, Gates, Probes, Reference

STUDY, CAPTURE, PROBE = "5" * 16, "c" * 16, "b" * 16


def change(name, kind="quantize", kl=0.01, **more):
    values = {
        "group": more.get("format") or "given",
        "sites": ["attn_in", "mlp_in"],
        "layers": [0, 1],
        "features": [],
        "format": None,
        "weights": None,
        "held": [],
        "range": None,
        "smooth": None,
        "prefix": [],
        "weight": None,
        "value": None,
        "perplexity": 16.0 * (1 + kl),
        "perplexity_interval": None,
        "kl": kl,
        "kl_interval": [0.9 * kl, 1.1 * kl],
        "top1_probability": 0.5,
        "agreement": 0.9,
        "agreement_interval": None,
        "distinguishable": True,
        "predicted_kl": None,
    }
    return Change(name=name, kind=kind, **(values | more))


def probes(*changes, floor=0.0001, **more):
    values = {
        "probe_id": PROBE,
        "study_id": STUDY,
        "capture_id": CAPTURE,
        "model": "hub/model",
        "corpus": "builtin:python-docs",
        "dtype": "float32",
        "sequences": 16,
        "tokens": 16 * 63,
        "sites": ["attn_in", "mlp_in"],
        "gates": Gates(
            reference=Gate(compared=True, reason=None, value=0.0),
            identity=Gate(compared=True, reason=None, value=0.0),
            floor=Gate(compared=True, reason=None, value=floor),
            prefix_sharing=True,
        ),
        "reference": Reference(perplexity=16.0, nll=2.77, top1_probability=0.5),
        "changes": list(changes),
        "super_weights": [],
        "notes": [],
    }
    return Probes(**(values | more))


def row(site, layer, name, predicted, kl=None):
    return {
        "site": site,
        "layer": layer,
        "format": name,
        "kl": kl,
        "squared_error": 1.0,
        "relative_error": 0.01,
        "predicted_kl": predicted,
    }
