"""Watches the experts of a live model: hooks give what each one gets and gives, once for each layer of a forward pass.

Nothing is computed twice and nothing changes: while a module of experts runs, a TorchFunctionMode passes every result through
untouched and `record` reads it. Before: `model.experts` names the modules. After: `add` counts what `take` is given. Every
assumption about a family's code is checked; what does not fit raises SiteError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from outliers.errors import SiteError
from outliers.experts.record import Give, Products, Ranking, tensors_of
from outliers.experts.routed import Routed, Routing, Shared
from outliers.model.experts import ROUTERS, SECOND, ExpertsInfo

GATE = "shared_expert_gate"
"""Child of a block whose sigmoid multiplies the shared expert's output (Qwen2Moe, Qwen3Next)."""


class ExpertWatch:
    """Hooks on the experts of some layers of a backbone; `take` gets each layer's Routed while its block still runs.

    Between `start` and `end` every watched layer must be seen exactly once; outside of them the hooks do nothing. `take` runs
    in the thread of the forward pass, and the tensors that it gets are valid until it returns. begin: asked for before the
    first expert of a layer that computes one expert after the other (eager, in host memory); what it returns takes each of
    them at once, and `take` gets that layer without rows, down_in and output.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        info: ExpertsInfo,
        layers: tuple[int, ...],
        take: Callable[[Routed], None],
        begin: Callable[[Routing], Give] | None = None,
    ) -> None:
        """Raises SiteError for a layer without experts, or whose router is not known."""
        self._started = False
        self._tokens = 0
        self._handles: list[RemovableHandle] = []
        self._layers = [_Layer(base, info, layer, take, begin, self) for layer in layers]
        for layer in self._layers:
            self._handles += layer.attach()

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included; 0 where no pass is watched."""
        return self._tokens if self._started else 0

    def start(self, rows: int, positions: int) -> None:
        """Begin to watch: a pass over `rows` sequences of `positions` tokens, padding included."""
        self._tokens, self._started = rows * positions, True
        for layer in self._layers:
            layer.reset()

    def end(self) -> None:
        """End the pass. Raises SiteError if a layer was not seen exactly once."""
        self._started = False
        for layer in self._layers:
            layer.reset_tensors()
        wrong = [f"{layer.layer} ({layer.seen} times)" for layer in self._layers if layer.seen != 1]
        if wrong:
            raise SiteError(
                f"a forward pass gives the experts of each layer once, but not those of layer {', '.join(wrong)}"
            )

    def detach(self) -> None:
        """Remove every hook."""
        self._started = False
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Layer:
    """What has been seen of one layer in this pass, and its hooks."""

    def __init__(
        self,
        base: torch.nn.Module,
        info: ExpertsInfo,
        layer: int,
        take: Callable[[Routed], None],
        begin: Callable[[Routing], Give] | None,
        watch: ExpertWatch,
    ) -> None:
        if layer not in info.layers:
            raise SiteError(f"layer {layer} has no experts: layers {', '.join(map(str, info.layers))} have some")
        self.layer = layer
        self._info = info
        self._take = take
        self._begin = begin
        self._watch = watch
        self._block, self._router, self._experts = (
            base.get_submodule(path.replace("*", str(layer))) for path in (info.block, info.router, info.experts)
        )
        name = type(self._router).__name__
        if name not in ROUTERS:
            raise SiteError(f"the router of layer {layer} is a {name}, whose output is not known")
        self._form = ROUTERS[name]
        self._second = [base.get_submodule(f"{path.replace('*', str(layer))}.{SECOND}") for path in info.shared]
        self._all = info.watch == "all"
        self._products = Products()
        self._ranking = Ranking()
        self.reset()

    def reset(self) -> None:
        """Forget the former pass."""
        self.seen = 0
        self.reset_tensors()

    def reset_tensors(self) -> None:
        """Let go of the tensors of the pass."""
        self._routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._values: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._give: Give | None = None
        self._given = False
        self._shared: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._gate: torch.Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Add the hooks. The modes are closed by hooks that are called after an error too."""
        handles = [
            self._router.register_forward_pre_hook(self._open(self._ranking)),
            self._router.register_forward_hook(self._route, always_call=True),
        ]
        if self._all:
            handles += [
                self._experts.register_forward_pre_hook(self._stream),
                self._experts.register_forward_pre_hook(self._open(self._products)),
                self._experts.register_forward_hook(self._run, with_kwargs=True, always_call=True),
                *(second.register_forward_hook(self._share) for second in self._second),
            ]
            if hasattr(self._block, GATE):
                handles.append(getattr(self._block, GATE).register_forward_hook(self._weigh))
        return [*handles, self._block.register_forward_hook(self._finish)]

    def _open(self, mode: Products | Ranking) -> Callable[..., None]:
        def opened(*_: Any) -> None:
            if self._watch.tokens:
                mode.open()

        return opened

    def _stream(self, *_: Any) -> None:
        """Have each expert handed over as it is computed, where there is somebody who takes it so."""
        here = self._begin is not None and self._form != "scores" and self._watch.tokens
        self._products.give = self._one if here and self._routing and self._routing[0].device.type == "cpu" else None

    def _one(self, slots: torch.Tensor, tokens: torch.Tensor, down_in: torch.Tensor, output: torch.Tensor) -> None:
        if self._give is None and self._begin is not None and self._routing is not None:
            self._give = self._begin(Routing(self.layer, *self._routing[:2]))
        if self._give is not None:
            self._give(slots, tokens, down_in, output)

    def _route(self, _module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        """Take what the router gives: which experts, their weights, and by which score."""
        if not self._ranking.close() or output is None:  # None: the router has raised
            return
        found = tensors_of(output)
        if self._form == "scores":
            index = self._ranking.index
            weights = None if index is None else found[0].gather(1, index)
            score = self._ranking.score
        else:
            # (index, weights, logits) or (logits, weights, index): GraniteMoe's order depends on the version of transformers
            index, weights = (found[2] if found[0].is_floating_point() else found[0]), found[1]
            score = found[0] if self._form == "two maxima" else self._ranking.score
            if self._form != "two maxima" and not _same(index, self._ranking.index):
                raise self._wrong("the router gives other experts than its topk found")
        self._ranking.clear()
        if index is None or weights is None or score is None:
            raise self._wrong("the router has chosen without topk")
        self._routed(index, weights, score)

    def _routed(self, index: torch.Tensor, weights: torch.Tensor, score: torch.Tensor) -> None:
        tokens, info = self._watch.tokens, self._info
        self._check(index, (tokens, info.slots), "the chosen experts")
        self._check(weights, (tokens, info.slots), "the weights")
        self._check(score, (tokens, info.count), "the router's scores")
        if self._routing is not None:
            raise self._wrong("the router has run twice")
        self._routing = (index, weights.float(), _margin(score.to(index.device), index))

    def _run(self, _module: torch.nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        """Take what the experts got and gave, row by row."""
        if not self._products.close() or output is None:
            return
        if self._routing is None:
            raise self._wrong("the experts run before their router")
        if self._values is not None or self._given:
            raise self._wrong("the experts have run twice")
        index = self._routing[0]
        if self._form == "scores":
            self._values = self._products.dense(index, output, self._info.count)
        else:
            given = [value for value in tensors_of((*arguments, *keywords.values())) if not value.is_floating_point()]
            if len(given) != 1 or not _same(given[0], index):
                raise self._wrong("the experts get other indices than the router gave")
            self._given = self._products.all_given()
            if not self._given:
                self._values = self._products.sparse(len(index), index.shape[1], index.device)
        self._products.clear()
        if self._values is None:
            return
        slots, info = index.numel(), self._info
        for value, shape, name in zip(
            self._values,
            ((slots,), (slots, info.width), (slots, self._hidden)),
            ("the rows of its experts", "the inputs of its second projections", "the outputs of its experts"),
            strict=True,
        ):
            self._check(value, shape, name)

    @property
    def _hidden(self) -> int:
        """Features of an expert's output: the second projections are (E, H, I), or (E, I, H)."""
        return self._experts.get_parameter("down_proj").numel() // (self._info.count * self._info.width)

    def _share(self, _module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        """Take what a shared expert's second projection gets and gives; Llama4 adds the routed experts to it in place."""
        if self._watch.tokens:
            kept = output.clone() if self._form == "scores" else output
            self._shared.append((arguments[0].flatten(0, -2), kept.flatten(0, -2)))

    def _weigh(self, _module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        if self._watch.tokens:
            self._gate = torch.sigmoid(output).reshape(-1).float()

    def _finish(self, _module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        """Hand over the layer at the end of its block."""
        if not self._watch.tokens:
            return
        self.seen += 1
        found = tensors_of(output if isinstance(output, tuple | list) else (output,))
        if self._routing is None and type(self._experts).__name__ == "Mxfp4GptOssExperts":
            self._routed(*_by_kernel(found[1], self._info.slots))
        if self._routing is None or (self._all and self._values is None and not self._given):
            raise self._wrong(f"its block has run without its {'router' if self._routing is None else 'experts'}")
        index, weights, margin = self._routing
        rows, down_in, given = self._values if self._values is not None else (None, None, None)
        block = found[0].flatten(0, -2) if self._all else None
        if block is not None:
            self._check(block, (self._watch.tokens, self._hidden), "the sum of its experts")
        shared = self._shared_experts() if self._all else ()
        applied = self._form == "scores"
        self._take(Routed(self.layer, index, weights, applied, margin, rows, down_in, given, block, shared))
        self.reset_tensors()

    def _shared_experts(self) -> tuple[Shared, ...]:
        if len(self._shared) != len(self._second):
            raise self._wrong(f"{len(self._second)} shared experts have run {len(self._shared)} times")
        if self._gate is None and hasattr(self._block, GATE):
            raise self._wrong("its shared expert has run without its gate")
        for (down_in, given), width in zip(self._shared, self._info.shared_widths, strict=True):
            self._check(down_in, (self._watch.tokens, width), "the input of its shared expert's second projection")
            self._check(given, (self._watch.tokens, self._hidden), "the output of its shared expert")
        return tuple(Shared(down_in, given, self._gate) for down_in, given in self._shared)

    def _check(self, value: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
        if tuple(value.shape) != shape:
            raise self._wrong(f"{name} are {tuple(value.shape)} and should be {shape}")

    def _wrong(self, what: str) -> SiteError:
        return SiteError(
            f"the experts of layer {self.layer} ({type(self._experts).__name__}) can't be read: {what}; "
            "--experts routing or --experts off reads less"
        )


def _same(index: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether two are the same; a module that runs on another device gives a copy."""
    return other is not None and (index is other or torch.equal(index, other.to(index.device)))


def _margin(score: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The least score of a chosen expert less the largest of the others, float32; NaN where no other could be chosen."""
    least = score.gather(1, index).amin(1).float()
    other = score.scatter(1, index, -torch.inf).amax(1).float()
    return torch.where(other == -torch.inf, torch.nan, least - other)


def _by_kernel(logits: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, weights, score) of MXFP4's block, which calls no router: its rule, applied to the logits that the block gives.

    Source: transformers, integrations/mxfp4.py, routing_torch_dist: the first of equal logits, then a softmax over the chosen.
    """
    order = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :slots]
    return order, torch.softmax(logits.gather(1, order), dim=1), logits
