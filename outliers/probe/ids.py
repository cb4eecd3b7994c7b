"""The id of a probe, and what of its study it needs. No torch here: planning reads it."""

from __future__ import annotations

from outliers.spec import PROBE_VERSION, ProbeSpec, StudySpec, digest
from outliers.spec.formats import parse_format
from outliers.spec.probe import WORDS
from outliers.study.prepare import ID_LENGTH, Prepared

AUTO = "auto"
CHECK_FORMATS = ("int8_token", "fp8_token", "mxfp4_even", "nvfp4")
"""Formats of a check where the study names none."""
CHECK_FEATURES = ("systematic", "matched", "random=5")
CHECK_MEANS = ("systematic", "matched")


def asked_of(spec: StudySpec) -> ProbeSpec:
    """The ProbeSpec with a check written out: what is really changed."""
    probe = spec.probe
    if probe.probe != "check":
        return probe
    formats = spec.formats.formats or CHECK_FORMATS
    return probe.model_copy(
        update={
            "zero": tuple(dict.fromkeys((*CHECK_FEATURES, *probe.zero))),
            "mean": tuple(dict.fromkeys((*CHECK_MEANS, *probe.mean))),
            "quantize": tuple(dict.fromkeys((*formats, *probe.quantize))),
            "hold": tuple(dict.fromkeys(("systematic", *probe.hold))),
        }
    )


def uses_study(spec: StudySpec) -> bool:
    """Whether features, means, ranges or tokens of a probe come from what its study counted."""
    asked = asked_of(spec)
    words = [name for name in (*asked.zero, *asked.mean, *asked.hold) if name.partition("=")[0] in WORDS]
    formats = (*asked.quantize, *([asked.map] if asked.map else []))
    static = any(parse_format(name).is_static for name in formats)
    return bool(words or asked.mean or static or asked.prefix == AUTO)


def needs_findings(spec: StudySpec) -> bool:
    """Whether a probe can't begin before its study was counted: its list, or its massive activations, are asked for."""
    asked = asked_of(spec)
    words = [name for name in (*asked.zero, *asked.mean, *asked.hold) if name.partition("=")[0] in WORDS]
    return bool(words or asked.prefix == AUTO)


def probe_id(prepared: Prepared) -> str:
    """The id of a probe of a prepared study: of all that its numbers depend on."""
    payload: dict[str, object] = {
        "version": PROBE_VERSION,
        "capture": prepared.capture_id,
        "study": prepared.study_id if uses_study(prepared.spec) else None,
        "probe": asked_of(prepared.spec).model_dump(mode="json", exclude={"probe"}),
    }
    if asked_of(prepared.spec).map:
        # the map's table has the errors of these formats too
        payload["formats"] = list(prepared.spec.formats.formats)
    return digest(payload)[:ID_LENGTH]
