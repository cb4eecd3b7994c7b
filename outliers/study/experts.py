"""What a study reads of a model's experts: decided from its options and the model's description, before a weight is read."""

from __future__ import annotations

from typing import Literal

from outliers.errors import BadInput
from outliers.model.describe import ModelInfo
from outliers.spec import StudySpec
from outliers.study.expert_shapes import ExpertShapes

Mode = Literal["all", "routing", "off"]


def expert_mode(spec: StudySpec, info: ModelInfo, layers: tuple[int, ...]) -> Mode:
    """`all`, `routing` or `off`, for the captured layers. Raises BadInput where a model can't give what was asked for."""
    asked, experts, name = spec.capture.experts, info.experts, info.source.name
    if asked == "off":
        return "off"
    if experts is None:
        if asked != "auto":
            why = (
                f"the router or the shapes of the experts of {info.architecture} are not known"
                if info.anatomy.moe_layers
                else "it has no experts"
            )
            raise BadInput(f"--experts {asked}: {name} can't be read so: {why}; leave the option out")
        return "off"
    there = [layer for layer in experts.layers if layer in layers]
    if not there:
        if asked != "auto":
            raise BadInput(
                f"--experts {asked}: none of the layers that are read has experts; {name} has them in "
                f"{', '.join(map(str, experts.layers))}: add one of these to --layers, or leave --experts out"
            )
        return "off"
    if asked == "all" and experts.watch != "all":
        raise BadInput(
            f"--experts all: the inputs and outputs of the experts of {name} can't be read, {experts.reason}: "
            "give --experts routing, or --quantization none, which makes the weights plain"
        )
    return experts.watch if asked == "auto" else asked


def expert_shapes(spec: StudySpec, info: ModelInfo, layers: tuple[int, ...]) -> ExpertShapes | None:
    """Shapes of the experts of a study's capture, None where none are read. Raises BadInput."""
    mode, experts = expert_mode(spec, info, layers), info.experts
    if mode == "off" or experts is None:
        return None
    return ExpertShapes(
        layers=tuple(layer for layer in experts.layers if layer in layers),
        experts=experts.count,
        slots=experts.slots,
        width=experts.width,
        shared_widths=experts.shared_widths if mode == "all" else (),
        hidden=info.hidden_size,
        values=mode == "all",
        applied=experts.applied,
    )
