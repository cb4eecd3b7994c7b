"""Where the experts of a model are, and whether a forward pass can be watched: as data, known before a weight is read.

Paths are relative to the backbone, with `*` for the layer's number. It holds no live module and needs no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ExpertsInfo(BaseModel):
    """The experts of a mixture-of-experts model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...]
    """Layers of the model that have experts."""
    block: str
    """The module that holds router and experts, and gives what is added to the residual stream."""
    router: str
    experts: str
    shared: tuple[str, ...]
    """Shared experts: modules with a second projection of their own."""
    count: int
    """Routed experts of a layer."""
    slots: int
    """Experts that a token is routed to."""
    width: int
    shared_widths: tuple[int, ...]
    applied: bool
    """Whether an expert's input is multiplied by its weight, and not its output (Llama4)."""
    watch: Literal["all", "routing"]
    """What can be read: `routing` where kernels hide the experts' inputs and outputs."""
    reason: str | None
    """Why it is routing alone, as the end of a sentence."""
