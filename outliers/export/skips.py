"""Which modules a quantizer leaves alone: the head, routers, and those whose input is larger than a limit."""

from __future__ import annotations

from dataclasses import dataclass

from outliers.errors import BadInput
from outliers.export.source import SITES, Study
from outliers.model.readers import HEAD, Reader
from outliers.units import format_ranges

GATE = "shared_expert_gate"
"""The projection that weighs a shared expert: one row, and it decides as a router does."""


@dataclass(frozen=True)
class Skips:
    """Modules to leave alone.

    always: the head, routers and gates, whatever the study found. large: (module, largest abs of its input) above the limit,
    the largest first. unknown: modules whose input is not a site, or whose site can't be captured with the others.
    expert_layers: layers whose experts have a second projection, which reads no site either.
    """

    always: tuple[str, ...]
    large: tuple[tuple[Reader, float], ...] = ()
    unknown: tuple[Reader, ...] = ()
    expert_layers: tuple[int, ...] = ()

    @property
    def experts(self) -> tuple[str, ...]:
        """The modules of experts among `large`: one module there, and several in some quantizers."""
        return tuple(reader.name for reader, _ in self.large if reader.kind == "experts")

    @property
    def projections(self) -> tuple[str, ...]:
        """The other modules among `large`, without those that are left alone anyway."""
        return tuple(r.name for r, _ in self.large if r.kind == "projection" and r.name not in self.always)

    def lines(self) -> list[str]:
        """What is left alone, for a person."""
        said = [f"left alone always: {', '.join(_short(self.always))}"]
        said += [
            f"left alone: {reader.name}, the largest abs of its input is {peak:,.6g}" for reader, peak in self.large
        ]
        if self.unknown:
            names = _short([reader.name for reader in self.unknown])
            said.append(f"not judged, because no captured site is their input: {', '.join(names)}")
        if self.expert_layers:
            said.append(
                f"not judged: the second projections of the experts of layers {format_ranges(self.expert_layers)}"
            )
        return said


def find_skips(study: Study, above: float | None) -> Skips:
    """What to leave alone in a study. `above`: the limit of --skip-above; None lists no module for its magnitude.

    Raises BadInput where the input of a projection was not captured, because a list without it would look complete.
    """
    routers = [r.name for r in study.readers if r.kind == "router" or r.name.endswith(GATE)]
    always = (HEAD, *routers)
    if above is None:
        return Skips(always)
    if not above > 0:
        raise BadInput(f"--skip-above {above:g} is not above 0: give the largest abs of an input that may be quantized")
    layers = set(range(study.prepared.model.num_layers))
    whole = [site for site in SITES if {r.layer for r in study.readers if r.site == site} == layers]
    study.check_sites(tuple(whole), "--skip-above")
    judged = [r for r in study.readers if r.site is not None and study.has(r.site, r.layer)]
    unknown = tuple(r for r in study.readers if r not in judged)
    peaks = [(r, study.columns(r.site, r.layer).peak) for r in judged if r.site is not None]
    large = sorted(((r, peak) for r, peak in peaks if peak > above), key=lambda found: (-found[1], found[0].name))
    if large and len(large) == len(judged):
        raise BadInput(
            f"--skip-above {above:g} leaves nothing to quantize: the input of every module has a larger value, the least is "
            f"{min(peak for _, peak in large):,.6g}"
        )
    inside = tuple(reader.layer for reader in judged if reader.kind == "experts")
    return Skips(always, tuple(found for found in large if found[0].name not in always), unknown, inside)


def _short(names: list[str] | tuple[str, ...]) -> list[str]:
    """Names of modules with the numbers of their layers joined: `model.layers.{0-29}.mlp.gate`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parts = name.split(".")
        at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            layers[name, ""] = []
        else:
            layers.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), []).append(int(parts[at]))
    return [
        f"{begin}.{{{format_ranges(numbers, ',')}}}.{end}"
        if len(numbers) > 1
        else f"{begin}.{numbers[0]}.{end}"
        if numbers
        else begin
        for (begin, end), numbers in layers.items()
    ]
