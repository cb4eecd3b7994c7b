"""What a probe is asked for, with a check written out. No torch here."""

from __future__ import annotations

from outliers.spec import ProbeSpec, StudySpec
from outliers.spec.probe import SUPER, WORDS
from outliers.study.probes import DEFAULT_FORMATS, RANDOM_FEATURES

AUTO = "auto"
CHECK_FEATURES = ("systematic", "matched", f"random={RANDOM_FEATURES}")
CHECK_MEANS = ("systematic", "matched")


def asked_of(spec: StudySpec) -> ProbeSpec:
    """The ProbeSpec with a check written out: what is really changed."""
    probe = spec.probe
    if probe.probe != "check":
        return probe
    formats = spec.formats.formats or DEFAULT_FORMATS
    experts = () if spec.capture.experts == "off" else (SUPER,)
    return probe.model_copy(
        update={
            "zero": tuple(dict.fromkeys((*CHECK_FEATURES, *probe.zero))),
            "mean": tuple(dict.fromkeys((*CHECK_MEANS, *probe.mean))),
            "quantize": tuple(dict.fromkeys((*formats, *probe.quantize))),
            "experts": tuple(dict.fromkeys((*experts, *probe.experts))),
            "hold": tuple(dict.fromkeys(("systematic", *probe.hold))),
        }
    )


def needs_findings(spec: StudySpec) -> bool:
    """Whether a probe can't begin before its study was counted: its list, or its massive activations, are asked for."""
    asked = asked_of(spec)
    words = [name for name in (*asked.zero, *asked.mean, *asked.hold) if name.partition("=")[0] in WORDS]
    return bool(words or asked.prefix == AUTO or SUPER in asked.experts)
