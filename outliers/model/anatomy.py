"""Where everything is in one model, as data: the sites of each layer, the backbone, the experts.

Paths are relative to the backbone, the part of a model that runs without its head. `:input` at the end of a path means
that the module's input is read, not its output. It holds no live module and needs no torch: a study carries it to machines.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from outliers.model.families import INPUT
from outliers.spec import SITES


class SiteModule(BaseModel):
    """One tensor to read: the `output` or the `input` of the module at `path`, relative to the backbone."""

    model_config = ConfigDict(frozen=True)

    site: str
    layer: int
    path: str
    side: Literal["output", "input"]


class Anatomy(BaseModel):
    """Where everything is in one model. Paths have `:input` at the end where a module's input is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str
    """Path of the backbone from the whole model: all layers, no head."""
    layers: str
    """Path of the list of decoder layers, from the backbone."""
    sites: dict[str, tuple[str, ...]]
    """Site -> path of its module in each layer, empty in a layer without the site (`down_in` in a layer of experts). A site
    that can't be named is not there."""
    widths: dict[str, int]
    """Site -> its features. Missing where the layers differ in it."""
    moe_layers: tuple[int, ...]
    router: str | None
    """Path of a router with `*` for the layer, or None for a dense model."""
    experts: str | None

    def modules(self, sites: tuple[str, ...], layers: tuple[int, ...]) -> list[SiteModule]:
        """Every (site, layer) exactly once, in the order of a forward pass's layers; each site is in each of them."""
        return [_site_module(site, layer, self.sites[site][layer]) for layer in layers for site in sites]

    def layers_of(self, site: str) -> tuple[int, ...]:
        """The layers that have a site."""
        return tuple(layer for layer, path in enumerate(self.sites[site]) if path)

    def alias_of(self, site: str) -> str | None:
        """The site that is the very same tensor in every layer and comes before this one, if any."""
        for other in SITES[: SITES.index(site)]:
            if site in self.sites and self.sites.get(other) == self.sites[site]:
                return other
        return None

    def pattern(self, site: str) -> str:
        """The paths of a site for a person: `*` for the layer's number, alternatives joined by `|`."""
        begin = f"{self.layers}."
        patterns = {f"{begin}*{p[len(begin) + len(str(n)) :]}" for n, p in enumerate(self.sites[site]) if p}
        return " | ".join(sorted(patterns))


def _site_module(site: str, layer: int, path: str) -> SiteModule:
    if path.endswith(INPUT):
        return SiteModule(site=site, layer=layer, path=path.removesuffix(INPUT), side="input")
    return SiteModule(site=site, layer=layer, path=path, side="output")
