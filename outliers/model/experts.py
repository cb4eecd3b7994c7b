"""Where the experts of a model are, and whether a forward pass can be watched: as data, known before a weight is read.

Paths are relative to the backbone, with `*` for the layer's number. ExpertsInfo holds no live module. `find_experts` reads the
shapes of a model without weights; it knows routers by their class, because a router's output has no common form.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from outliers.model.anatomy import Anatomy

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""How transformers computes fused experts with torch's own products, which can be watched (integrations/moe.py)."""

ROUTERS: dict[str, Literal["weights, index", "scores", "two maxima"]] = {
    **dict.fromkeys(
        (
            "MixtralTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Glm4MoeTopkRouter",
            "DeepseekV3TopkRouter",
            "GptOssTopKRouter",
        ),
        "weights, index",
    ),
    "GraniteMoeTopKRouter": "weights, index",
    "Llama4Router": "scores",
    "PhimoeTopKRouter": "two maxima",
}
"""Class of a router -> what it returns: (logits, weights, index), or the same from its end; (scores of all experts, logits),
whose experts get inputs that are multiplied already; or the first form with the two experts of largest logits, without topk."""

SHARED = ("shared_expert", "shared_experts")
"""Children of a block of experts that every token passes through."""
SECOND = "down_proj"
"""The second projection of an expert, shared or not."""
LARGEST = 65_534
"""The largest number of experts, and of features of one, that the routing table's 16 bits hold."""


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


def find_experts(
    base: Any, anatomy: Anatomy, config: Any, implementation: str | None, quantization: str | None
) -> ExpertsInfo | None:
    """The experts of a backbone, from its modules' shapes; None for a dense model and for a router that is not known.

    base: the backbone, on any device. config: of the text model. implementation: as transformers names it. quantization: the
    method in which the weights stay in memory, None for plain ones. None too where the layers' experts have several shapes, or
    shapes that contradict the config or that no routing table holds: such a model is read without its experts.
    """
    if not anatomy.moe_layers or anatomy.router is None or anatomy.experts is None:
        return None
    block = anatomy.router.rpartition(".")[0]
    first = base.get_submodule(_at(block, anatomy.moe_layers[0]))
    router = base.get_submodule(_at(anatomy.router, anatomy.moe_layers[0]))
    if type(router).__name__ not in ROUTERS:
        return None
    names = tuple(name for name in SHARED if hasattr(first, name))
    paths = [_at(anatomy.experts, layer) for layer in anatomy.moe_layers]
    hidden = int(config.hidden_size)
    shapes = {_shape(base.get_submodule(path), hidden) for path in paths}
    shared = {
        tuple(int(base.get_submodule(f"{_at(block, layer)}.{name}.{SECOND}").in_features) for name in names)
        for layer in anatomy.moe_layers
    }
    if len(shapes) > 1 or len(shared) > 1 or (shape := shapes.pop()) is None:
        return None
    (count, width), shared_widths = shape, shared.pop()
    if max(count + len(names), width, *shared_widths, hidden) > LARGEST:
        return None
    reason = _hidden(implementation, quantization)
    return ExpertsInfo(
        layers=anatomy.moe_layers,
        block=block,
        router=anatomy.router,
        experts=anatomy.experts,
        shared=tuple(f"{block}.{name}" for name in names),
        count=count,
        slots=2 if ROUTERS[type(router).__name__] == "two maxima" else int(config.num_experts_per_tok),
        width=width,
        shared_widths=shared_widths,
        applied=ROUTERS[type(router).__name__] == "scores",
        watch="all" if reason is None else "routing",
        reason=reason,
    )


def _at(pattern: str, layer: int) -> str:
    return pattern.replace("*", str(layer))


def _shape(experts: Any, hidden: int) -> tuple[int, int] | None:
    """(experts, width of one) of a module of fused experts, whose second projections are (E, H, I), or (E, I, H); None where
    another number of features than the hidden ones comes out."""
    count, rows, columns = experts.down_proj.shape
    # Llama4's module, which knows no implementations, multiplies from the right too
    transposed = bool(getattr(experts, "is_transposed", type(experts).__name__ == "Llama4TextExperts"))
    given, width = (columns, rows) if transposed else (rows, columns)
    return (int(count), int(width)) if given == hidden else None


def _hidden(implementation: str | None, quantization: str | None) -> str | None:
    """Why the experts' inputs and outputs can't be read; None if they can.

    transformers puts modules of its own in the place of the experts: Mxfp4GptOssExperts (integrations/mxfp4.py), FP8Experts
    (integrations/finegrained_fp8.py); other methods bring theirs.
    """
    if quantization is not None:
        return f"the weights stay in {quantization}, whose kernels hide what an expert gets and gives"
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        return f"the experts run as {implementation}, a kernel that hides what an expert gets and gives"
    return None
