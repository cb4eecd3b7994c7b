"""From a probe's numbers to a verdict: each format against a budget, what repairs it, what it depends on, in one paragraph.

It computes nothing new: it compares, sorts, and says what was measured, on which tokens, and how sure that is. What was not
tried is named together with the command that tries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outliers.errors import BadInput
from outliers.results.schema.advice import Advice, Cause, FormatVerdict, Place, Repair, Verdict
from outliers.results.schema.probes import Change, Probes
from outliers.spec import public_name
from outliers.spec.formats import parse_format

DEFAULT_BUDGET = 0.05
"""Most KL that is accepted without --budget, in nats a token: the perplexity grows by about 5% where all of it is loss.
Chosen. For scale: SmolLM2-135M with inputs in int8, a scale a token, is at 0.036; with NVFP4 at 0.2."""
FLOORS = 2.0
"""A KL below this multiple of the floor can't be distinguished from rounding."""
NAMED_PLACES = 5
"""Places that the paragraph names."""


def advise(
    probes: Probes,
    rows: Sequence[Mapping[str, Any]],
    budget: float = DEFAULT_BUDGET,
    names: tuple[str, str] | None = None,
) -> Advice:
    """The verdict of one probe.

    probes: what was measured. rows: of sensitivity.parquet, empty without a map. budget: most KL that is accepted, in nats a
    token. names: what the paragraph calls model and corpus (default: as they are published without a name). Raises BadInput for
    a budget that is not positive and finite.
    """
    if not 0 < budget < float("inf"):
        raise BadInput(f"a budget is a positive KL in nats a token, such as {DEFAULT_BUDGET:g}; got {budget:g}")
    floor = probes.gates.floor.value or 0.0
    formats = _formats(probes, rows, budget, floor)
    causes = _causes(probes)
    found = Advice(
        study_id=probes.study_id,
        probe_id=probes.probe_id,
        model=probes.model,
        corpus=probes.corpus,
        dtype=probes.dtype,
        sequences=probes.sequences,
        tokens=probes.tokens,
        budget=budget,
        floor=floor,
        perplexity=probes.reference.perplexity,
        formats=formats,
        causes=causes,
        sites=list(probes.sites),
        not_tried=_not_tried(probes, rows, formats),
        paragraph="",
    )
    return found.model_copy(update={"paragraph": verdict_words(probes, found, names)})


def verdict_words(probes: Probes, advice: Advice, names: tuple[str, str] | None = None) -> str:
    """The whole paragraph of a verdict. names: as in `advise`."""
    return " ".join([paragraph(advice, names), *expert_sentences(probes)])


def verdict_of(kl: float, interval: Sequence[float] | None, budget: float, floor: float) -> Verdict:
    """Where a KL stands against a budget. Without an interval the number alone decides, and the caller says so."""
    if kl < FLOORS * floor:
        return "indistinguishable"
    low, high = interval or (kl, kl)
    if high <= budget:
        return "within"
    return "beyond" if low > budget else "unclear"


def _is_plain(change: Change) -> bool:
    """Whether a format was tried at all sites without any repair."""
    if change.kind != "quantize" or change.format is None:
        return False
    repaired = change.held or change.smooth is not None or change.prefix or parse_format(change.format).rotation
    return not repaired and change.range != "without_first_tokens"


def _formats(probes: Probes, rows: Sequence[Mapping[str, Any]], budget: float, floor: float) -> list[FormatVerdict]:
    plain = {(c.format, c.weights): c for c in probes.changes if _is_plain(c)}
    mapped = {
        row["format"] for row in rows if row["predicted_kl"] is not None and not parse_format(row["format"]).rotation
    }
    keys = [*plain, *((name, None) for name in sorted(mapped) if (name, None) not in plain)]
    found = [_format(key, plain.get(key), probes, rows, budget, floor) for key in keys if key[0] is not None]
    return sorted(found, key=lambda item: (_known(item), item.format))


def _known(item: FormatVerdict) -> tuple[bool, float]:
    kl = item.confirmed_kl if item.confirmed_kl is not None else item.predicted_kl
    return kl is None, kl or 0.0


def _format(
    key: tuple[str | None, str | None],
    joint: Change | None,
    probes: Probes,
    rows: Sequence[Mapping[str, Any]],
    budget: float,
    floor: float,
) -> FormatVerdict:
    name, weights = str(key[0]), key[1]
    own = _predictions(name, joint, rows) if weights is None else []
    repairs = [] if joint is None else _repairs(name, weights, joint, probes, budget, floor)
    return FormatVerdict(
        format=name,
        weights=weights,
        predicted_kl=sum(row["predicted_kl"] for row in own) if own else None,
        confirmed_kl=None if joint is None else joint.kl,
        confirmed_interval=None if joint is None else joint.kl_interval,
        perplexity=None if joint is None else joint.perplexity,
        verdict=None if joint is None else verdict_of(joint.kl, joint.kl_interval, budget, floor),
        leave_alone=_leave_alone(own, budget) if own else None,
        repairs=repairs,
    )


def _predictions(name: str, joint: Change | None, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The map's rows of a format, one for each place; none where a place has no prediction, for their sum would be too small."""
    own = [row for row in rows if row["format"] == name and row["predicted_kl"] is not None]
    places = {(row["site"], row["layer"]) for row in rows}
    if joint is not None:
        places |= {(site, layer) for site in joint.sites for layer in joint.layers}
    return own if len(own) == len(places) else []


def _leave_alone(rows: Sequence[Mapping[str, Any]], budget: float) -> list[Place]:
    """The costliest places, as few as bring the predicted sum of the others within the budget."""
    ordered = sorted(rows, key=lambda row: (-row["predicted_kl"], row["layer"], row["site"]))
    left, found = sum(row["predicted_kl"] for row in rows), []
    for row in ordered:
        if left <= budget:
            break
        left -= row["predicted_kl"]
        found.append(Place(site=row["site"], layer=row["layer"], predicted_kl=max(0.0, row["predicted_kl"])))
    return found


def _repairs(
    name: str, weights: str | None, joint: Change, probes: Probes, budget: float, floor: float
) -> list[Repair]:
    found = []
    for change in probes.changes:
        if change.kind != "quantize" or change.format is None or change.weights != weights or _is_plain(change):
            continue
        base = parse_format(change.format)
        if base.base != name:
            continue
        kind, what = _kind(change)
        found.append(
            Repair(
                kind=kind,
                what=what,
                kl=change.kl,
                kl_interval=change.kl_interval,
                perplexity=change.perplexity,
                verdict=verdict_of(change.kl, change.kl_interval, budget, floor),
                helps=_helps(joint, change),
            )
        )
    return sorted(found, key=lambda item: (item.kl, item.kind, item.what))


def _kind(change: Change) -> tuple[Any, str]:
    """What repairs a format in a change, and in which form. A change has one repair, or is named by its strongest."""
    if change.prefix:
        return "prefix", f"tokens {', '.join(map(str, change.prefix))} before each sequence"
    if change.smooth is not None:
        return "smooth", f"SmoothQuant {change.smooth:g}"
    if change.format is not None and (block := parse_format(change.format).rotation):
        return "rotate", f"Hadamard blocks of {block}"
    if change.held:
        named = ", ".join(map(str, change.held[:8])) + (
            f" and {len(change.held) - 8} more" if len(change.held) > 8 else ""
        )
        return "hold", f"feature{'s'[: len(change.held) != 1]} {named} unquantized"
    return "range", "a static range without first tokens"


def _helps(joint: Change, change: Change) -> bool | None:
    """Whether a repair lowers the KL; None where both intervals overlap, or are not there."""
    if joint.kl_interval is None or change.kl_interval is None:
        return None
    if change.kl_interval[1] < joint.kl_interval[0]:
        return True
    return False if change.kl_interval[0] > joint.kl_interval[1] else None


def _causes(probes: Probes) -> list[Cause]:
    return [
        Cause(
            kind=change.kind,
            what=_what(change),
            features=change.features,
            kl=change.kl,
            perplexity=change.perplexity,
            distinguishable=change.distinguishable,
        )
        for change in probes.changes
        if change.kind in ("zero", "mean", "weight", "silence")
    ]


def _what(change: Change) -> str:
    if change.kind == "silence":
        return change.name
    return change.weight if change.kind == "weight" and change.weight else change.group


def _not_tried(probes: Probes, rows: Sequence[Mapping[str, Any]], formats: Sequence[FormatVerdict]) -> list[str]:
    beyond = [item for item in formats if item.verdict in ("beyond", "unclear")]
    found = []
    if not rows:
        found.append("which places cost most: --map int8_token")
    tried = {repair.kind for item in formats for repair in item.repairs}
    if beyond:
        names = ",".join(item.format for item in beyond[:4])
        ways = {
            "hold": f"--quantize {names} --hold systematic",
            "rotate": "--quantize " + ",".join(f"had64+{item.format}" for item in beyond[:4]),
            "smooth": f"--quantize {names} --smooth 0.5",
            "prefix": f"--quantize {names} --prefix auto",
        }
        words = {
            "hold": "holding features out",
            "rotate": "rotation",
            "smooth": "smoothing",
            "prefix": "a prefix token",
        }
        found += [f"{words[kind]}: {command}" for kind, command in ways.items() if kind not in tried]
    if not any(change.weights for change in probes.changes):
        found.append("quantized weights: --weights FORMAT with --quantize")
    if "down_in" not in probes.sites:
        found.append("the input of the MLP's second projection: a study with --sites attn_in,mlp_in,o_in,down_in")
    return found


def paragraph(advice: Advice, names: tuple[str, str] | None = None) -> str:
    """The verdict in words: what was measured, what stays within the budget, what doesn't, what helps, what it depends on."""
    model, corpus = names or (public_name(advice.model), advice.corpus)
    sentences = [
        f"Measured on {model} in {advice.dtype}, {corpus}, {advice.tokens:,} tokens of {advice.sequences:,} "
        f"sequences, with emulated formats at {', '.join(advice.sites)}: perplexity {_number(advice.perplexity)} untouched."
    ]
    if not advice.floor > 0:
        sentences.append("The floor is not known: a small effect may be rounding.")
    probed = [item for item in advice.formats if item.verdict is not None]
    if probed and all(item.confirmed_interval is None for item in probed):
        sentences.append("There are no intervals, for there are too few sequences.")
    sentences += _format_sentences(advice)
    sentences += _cause_sentences(advice.causes)
    if advice.not_tried:
        sentences.append(f"Not tried: {', '.join(item.partition(':')[0] for item in advice.not_tried)}.")
    return " ".join(sentences)


def expert_sentences(probes: Probes) -> list[str]:
    """Where a format costs most at the input of one expert alone; nothing where no expert was tried."""
    mapped = sorted((c for c in probes.changes if c.kind == "map" and c.experts), key=lambda c: (-c.kl, c.name))
    if not mapped:
        return []
    rounding = sum(not change.distinguishable for change in mapped)
    named = [change for change in mapped if change.distinguishable][:NAMED_PLACES]
    some = f", and {rounding:,} of {len(mapped):,} can't be told from rounding" if rounding else ""
    if not named:
        return [
            f"{mapped[0].format} at the input of one expert alone can't be told from rounding at any of {len(mapped):,}."
        ]
    costs = ", ".join(
        f"{change.experts[0]} (KL {_number(change.kl)}, {change.expert_tokens[0]:,} tokens)" for change in named
    )
    return [f"{mapped[0].format} at the input of one expert alone costs most at {costs}{some}."]


def _format_sentences(advice: Advice) -> list[str]:
    probed = [item for item in advice.formats if item.verdict is not None]
    said = []
    words = {
        "within": f"Within the budget of {advice.budget:g} nats a token",
        "indistinguishable": f"Not distinguishable from rounding (KL under {FLOORS * advice.floor:.2g})",
        "unclear": "Too close to the budget to tell",
        "beyond": "Beyond the budget",
    }
    for verdict, text in words.items():
        own = [_said(item) for item in probed if item.verdict == verdict]
        if own:
            said.append(f"{text}: {', '.join(own)}.")
    for item in probed:
        if item.verdict in ("beyond", "unclear"):
            said += _repaired(item)
    return said


def _said(item: FormatVerdict) -> str:
    span = item.confirmed_interval
    interval = f" [{span[0]:.2g}, {span[1]:.2g}]" if span else ""
    weights = f" with weights in {item.weights}" if item.weights else ""
    return (
        f"{item.format}{weights} (KL {item.confirmed_kl:.2g}{interval}, perplexity {_number(item.perplexity or 0.0)})"
    )


def _number(value: float) -> str:
    """Four digits, thousands separated."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _repaired(item: FormatVerdict) -> list[str]:
    said = []
    best = item.repairs[0] if item.repairs else None
    if best is not None:
        enough = {"within": "enough", "indistinguishable": "enough"}.get(best.verdict, "not enough")
        if best.helps:
            said.append(f"{item.format} improves most with {best.what}: KL {best.kl:.2g}, {enough}.")
        elif best.helps is None and item.confirmed_kl is not None and best.kl < item.confirmed_kl:
            said.append(f"{item.format} may improve with {best.what} (KL {best.kl:.2g}), within the uncertainty.")
        else:
            said.append(f"Nothing that was tried improves {item.format}.")
    if item.leave_alone:
        named = ", ".join(f"{place.site} of layer {place.layer}" for place in item.leave_alone[:NAMED_PLACES])
        more = len(item.leave_alone) - NAMED_PLACES
        others = f" and {more} more" if more > 0 else ""
        said.append(f"For {item.format} leave alone {named}{others}: the map predicts the rest within the budget.")
    return said


def _cause_sentences(causes: Sequence[Cause]) -> list[str]:
    zeroed = [cause for cause in causes if cause.kind == "zero"]
    said = []
    for group, words in (
        ("systematic", "the systematic features"),
        ("matched", "as many others of the largest magnitude"),
    ):
        own = [cause for cause in zeroed if cause.what == group]
        mean = [cause for cause in causes if cause.kind == "mean" and cause.what == group]
        if own:
            numbers = ", ".join(map(str, own[0].features[:8])) + (" ..." if len(own[0].features) > 8 else "")
            replaced = f" ({_number(mean[0].perplexity)} where they are replaced by their mean)" if mean else ""
            said.append(f"Without {words} ({numbers}) the perplexity is {_number(own[0].perplexity)}{replaced}.")
    others = [cause.perplexity for cause in zeroed if cause.what == "random"]
    if others:
        low, high = _number(min(others)), _number(max(others))
        said.append(f"Without a random feature it is {low if low == high else f'{low} to {high}'}.")
    weights = [cause for cause in causes if cause.kind == "weight"]
    if weights:
        worst = max(weights, key=lambda cause: cause.kl)
        said.append(f"Without the single weight {worst.what} it is {_number(worst.perplexity)}.")
    return said + _expert_sentences([cause for cause in causes if cause.kind == "silence"])


def _expert_sentences(silent: Sequence[Cause]) -> list[str]:
    """The super experts together, else the first expert, with their controls."""
    if not silent:
        return []
    together = {cause.what: cause for cause in silent}
    main = together.get("super experts", silent[0])
    if main is silent[0]:
        controls = [cause for cause in silent if cause.what.endswith(f"beside {main.what.removeprefix('expert ')})")]
    else:
        controls = [cause for cause in silent if cause.what.startswith("as many ")]
    name = "the super experts" if main.what == "super experts" else main.what
    compared = "".join(f", without {cause.what} {_number(cause.perplexity)}" for cause in controls)
    return [f"Without {name} the perplexity is {_number(main.perplexity)}{compared}."]
