"""Refuses a probe that can't be made, before a machine is asked for or a model is loaded. No torch here."""

from __future__ import annotations

from outliers.errors import BadInput
from outliers.probe.asked import AUTO, asked_of
from outliers.probe.changes import (
    QUANTIZED_SITES,
    error_formats,
    feature_sites,
    feature_width,
    parse_weight,
    quantized_sites,
)
from outliers.probe.expert_choice import check_experts, check_mapped
from outliers.spec.formats import parse_format
from outliers.study.prepare import Prepared


def check_before(prepared: Prepared) -> None:
    """Raise BadInput for a probe that is not to be made, before a machine is asked for: as `check_probe`, and without losses.

    A study without losses could be probed, and nothing would show that the probed model is the one that was captured.
    """
    if not prepared.spec.capture.perplexity:
        raise BadInput(
            "a probe compares its untouched pass with the losses of the capture, which this study does not measure: add "
            "--perplexity; activations that are captured already are kept, and one pass measures the losses"
        )
    check_probe(prepared)


def check_probe(prepared: Prepared) -> None:
    """Raise BadInput for a probe that can't be made, before a model is loaded. What the study found is not known here."""
    asked = asked_of(prepared.spec)
    if not asked.asked and prepared.spec.probe.probe == "none":
        raise BadInput(
            "nothing is asked of the probe: give --check, or --zero, --mean, --quantize, --weight, --map, --prefix or "
            "--probe-experts"
        )
    width, name = feature_width(prepared), prepared.model.source.name
    for option, given in (("--zero", asked.zero), ("--mean", asked.mean), ("--hold", asked.hold)):
        for feature in (int(one) for one in given if one.isdigit()):
            if feature >= width:
                raise BadInput(
                    f"{option} {feature}: {name} has the features 0 to {width - 1} at {', '.join(feature_sites(prepared))}"
                )
        if option == "--hold" and (wrong := [one for one in given if not (one.isdigit() or one == "systematic")]):
            raise BadInput(f"--hold {wrong[0]}: give systematic, or numbers of features")
    check_experts(prepared)
    check_mapped(prepared, quantized_sites(prepared))
    _check_sites(prepared)
    for layer in (parse_weight(one).layer for one in asked.weight if one != AUTO):
        if layer >= prepared.model.num_layers:
            raise BadInput(f"--weight of layer {layer}: {name} has layers 0 to {prepared.model.num_layers - 1}")
    if prepared.model.quantization is not None and (asked.weights or asked.weight):
        raise BadInput(
            f"the weights of {name} stay quantized in {prepared.model.quantization}, and no single one can be changed: give "
            "--quantization none, which is another study"
        )


def _check_sites(prepared: Prepared) -> None:
    """Raise BadInput for a format without a site, or whose rotation does not fit one."""
    asked, sites = asked_of(prepared.spec), quantized_sites(prepared)
    formats = (*asked.quantize, *(one for one in (asked.map, asked.weights) if one))
    if formats and not sites:
        raise BadInput(
            f"--quantize {formats[0]}: the study captured {', '.join(prepared.spec.capture.sites)}, and formats are tried at "
            f"{', '.join(QUANTIZED_SITES)}: capture one of these (--sites)"
        )
    for form in dict.fromkeys((*formats, *error_formats(prepared))):
        block = parse_format(form).rotation
        for site in sites:
            features = prepared.model.anatomy.widths[site]
            if block and features % block:
                raise BadInput(
                    f"{form} rotates blocks of {block} features, and {site} has {features}: give another block"
                )
    if (asked.smooth or asked.hold) and not asked.quantize:
        raise BadInput("--smooth and --hold go with formats: give --quantize int8_token, or others")
