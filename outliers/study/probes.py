"""The identity of a probe, and the names of what it leaves: arithmetic on ids, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outliers.spec import PROBE_VERSION, StudySpec, digest
from outliers.spec.probe import ALL
from outliers.study.prepare import ID_LENGTH, Prepared
from outliers.workspace import Workspace

PROBES, SENSITIVITY = "probes.json", "sensitivity.parquet"
PROBE_NUMBERS = (PROBES, SENSITIVITY)
"""What a machine makes of a probe."""


def probe_id(prepared: Prepared) -> str:
    """The id of the probe that a study asks for: features and ranges come from the study, so its id is a part.

    The formats that `--probe check` tries are the study's own, and a part of study_id.
    """
    asked = prepared.spec.probe.model_dump(mode="json")
    if not asked["experts"]:
        # a probe that names no experts has the id that it has without this field
        del asked["experts"]
    if not asked["map_experts"]:
        del asked["map_experts"]
    payload = {
        "probe": asked,
        "capture": prepared.capture_id,
        "study": prepared.study_id,
        "version": PROBE_VERSION,
    }
    return digest(payload)[:ID_LENGTH]


def probe_folder(prepared: Prepared, workspace: Workspace) -> Path:
    """Where the probe works on the machine with the model: its journal, and its numbers."""
    return workspace.capture(prepared.capture_id) / "probes" / probe_id(prepared)


def placed_probe(prepared: Prepared, workspace: Workspace) -> Path:
    """Where the results of the probe are on the side that asked for it."""
    return workspace.study(prepared.study_id) / "probes" / probe_id(prepared)


CHECKED_FEATURES = 8
"""Systematic features that `--probe check` takes one at a time, at most."""
RANDOM_FEATURES = 5
"""Random features that it takes, one at a time, as a control."""
MOST_MAPPED = 2_048
"""Experts of a map, at most: each is a pass, of which layers before it are left out, and a row of probes.json, whose size is
limited. A layer of Qwen3-30B-A3B has 128, one of DeepSeek-V3 256."""
CHECKED_EXPERTS = 8
"""Super experts that `--probe check` silences one at a time, at most: Qwen3-30B-A3B has three (arXiv 2507.23279)."""
DEFAULT_FORMATS = ("int8_token", "fp8_token", "mxfp4_even", "nvfp4")
"""Formats that it tries where the study names none."""


def mapped_count(names: Sequence[str], layers: int, experts: int) -> int:
    """How many experts `--map-experts` names, an upper bound. layers: that have experts. experts: of a layer."""
    if ALL in names:
        return layers * experts
    return sum(1 if "." in name else experts for name in names)


def count_passes(spec: StudySpec, layers: int, *, has_experts: bool = False, experts: int = 0) -> float:
    """Forward passes over the probe's sequences, an upper bound: the reference, the gates, and one a change.

    has_experts: whether the model is a mixture of experts. experts: of one layer.

    A change that begins at layer l skips the layers before it: a map takes half of its passes. How many features are
    systematic is not known before; CHECKED_FEATURES of them are counted.
    """
    probe = spec.probe
    # statistics, the untouched pass, two identities and the floor; the first batch again, to see whether layers can be left out
    found = 6.0 + (probe.prefix is not None)
    features = [*probe.zero, *probe.mean]
    formats = list(probe.quantize)
    if probe.probe == "check":
        features += ["systematic", "matched", "systematic", "matched", f"random={RANDOM_FEATURES}"]
        found += 2 * CHECKED_FEATURES
        formats += list(spec.formats.formats or DEFAULT_FORMATS)
        found += len(formats)  # again with the systematic features held out
    for name in features:
        word, _, number = name.partition("=")
        found += int(number or (RANDOM_FEATURES if word == "random" else 1))
        found += CHECKED_FEATURES if word == "systematic" and probe.probe != "check" else 0
    tries = 1 + bool(probe.hold) + len(probe.smooth) + 2 * (probe.prefix is not None)
    found += len(set(formats)) * tries * (1 + (probe.weights is not None)) + (probe.weights is not None)
    found += 3 * sum(3 if name == "auto" else 1 for name in probe.weight)
    if has_experts:
        found += len(set(formats)) if spec.capture.experts != "off" else 0  # at the experts' inputs alone
        wants_super = "super" in probe.experts or (probe.probe == "check" and spec.capture.experts != "off")
        # each with two controls, and all super experts together with theirs
        found += 3 * (len([name for name in probe.experts if name != "super"]) + (1 + CHECKED_EXPERTS) * wants_super)
    if probe.map is not None:
        found += layers * len(spec.capture.sites) / 2
    if ALL in probe.map_experts:
        found += layers * experts / 2
    else:
        found += mapped_count(
            probe.map_experts, layers, experts
        )  # where the layers are is not known here: whole passes
    return found
