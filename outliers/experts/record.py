"""What is read while a router, or a module of fused experts, runs: modes that see every torch function and change none.

A mode is opened by a pre-hook and closed by a hook; while it is open each torch function of the thread passes through it. It
reads results by the names of functions, in the order in which transformers calls them (integrations/moe.py and the modeling
files of each family). Knows tensors, nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from outliers.errors import SiteError

NONE, PRODUCT, TIMES, WHERE, SORT, TOPK = range(6)
"""What a torch function does in a module of experts, or in a router."""
_ROLES = {
    **dict.fromkeys(("linear", "matmul", "bmm", "mm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"), PRODUCT),
    **dict.fromkeys(("mul", "__mul__"), TIMES),
    "where": WHERE,
    "sort": SORT,
    "topk": TOPK,
}
Give = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes one expert as it was computed: the slot and the token of each row, (R,) int64, its inputs (R, I), its outputs (R, H)."""

_known: dict[Any, int] = {}
"""The role of a function, by the function itself, which is faster than by its name."""


def role_of(function: Any) -> int:
    """The role of a torch function."""
    role = _known.get(function)
    if role is None:
        role = _known[function] = _ROLES.get(getattr(function, "__name__", ""), NONE)
    return role


def tensors_of(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among some values."""
    return [value for value in values if isinstance(value, torch.Tensor)]


class _Mode(TorchFunctionMode):
    """A mode that can be closed without having been opened."""

    def __init__(self) -> None:
        super().__init__()
        self._open = False
        self.clear()

    def clear(self) -> None:
        """Let go of what was read."""
        raise NotImplementedError

    def open(self) -> None:
        """Read from here on."""
        self.clear()
        self._open = True
        self.__enter__()  # type: ignore[no-untyped-call]  # torch gives it no types; a pre-hook opens, a hook closes

    def close(self) -> bool:
        """Read no longer; returns whether the mode was open."""
        was, self._open = self._open, False
        if was:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above
        return was


class Ranking(_Mode):
    """Reads the last topk of a router: the scores that it is given, and what it finds."""

    def clear(self) -> None:
        """Let go of what was read."""
        self.score: torch.Tensor | None = None
        self.index: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and note a topk."""
        result = func(*args, **kwargs) if kwargs else func(*args)
        if role_of(func) == TOPK:
            self.score, self.index = args[0], result[1]
        return result


class Products(_Mode):
    """Reads the second products of experts.

    Every second product of matrices is an expert's second projection. Its input is read there, and its output, bias
    included, from the next multiplication, which is by the routing weights. Which row is which slot is the result of
    `where` (eager), the order of `sort` (grouped_mm), or the plain order. give: takes each expert of an eager module at once, and
    nothing of it is kept; without it, and of the other modules, all is kept until the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.give: Give | None = None

    def clear(self) -> None:
        """Let go of what was read."""
        self._places: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._orders: list[torch.Tensor] = []
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []
        self._products = self._given = 0
        self._waits = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and note what it was given, or gives, by its role."""
        result = func(*args, **kwargs) if kwargs else func(*args)
        role = _known.get(func)
        if role is None:
            role = role_of(func)
        if role == PRODUCT:
            self._products += 1
            if self._products % 2 == 0:
                # bmm(weight, input) where weights are not transposed: the input is a single column
                self._inputs.append(args[1] if func is torch.bmm and args[1].shape[-1] == 1 else args[0])
                self._waits = True
        elif role == TIMES and self._waits:
            self._outputs.append(args[0])
            self._waits = False
            if self.give is not None and self._places:
                self._hand_over(self.give)
        elif role == WHERE:
            self._places.append(result)
        elif role == SORT:
            self._orders.append(result[1])
        return result

    def _hand_over(self, give: Give) -> None:
        counts = (len(self._places), len(self._inputs), len(self._outputs))
        if counts != (1, 1, 1):
            raise SiteError(
                f"an expert should choose, multiply twice and then by its weights, once each, not {counts} times"
            )
        (slots, tokens), down_in, output = self._places.pop(), self._inputs.pop(), self._outputs.pop()
        self._given += 1
        give(slots, tokens, down_in, output)

    def all_given(self) -> bool:
        """Whether every expert was handed over; False where all is kept. Raises SiteError where some were."""
        if not self._given:
            return False
        kept = len(self._places) + len(self._inputs) + len(self._outputs) + len(self._orders)
        if kept or self._products != 2 * self._given:
            raise SiteError(
                f"{self._given} experts should multiply twice and then by their weights; {self._products} products were seen"
            )
        return True

    def sparse(self, tokens: int, slots: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(rows, down_in, output) of experts that are given the rows of their tokens; as in `Routed`. Raises SiteError."""
        runs = len(self._places) or 1
        if self._products != 2 * runs or len(self._outputs) != runs or (self._places and self._orders):
            raise SiteError(
                f"{runs} experts, or all at once, should multiply twice and then by their weights; seen were {self._products} "
                f"products, {len(self._outputs)} multiplications and {len(self._orders)} sorts"
            )
        if self._places:
            slot, token = (torch.cat([place[n] for place in self._places]) for n in range(2))
            rows = token * slots + slot
            seen = torch.zeros(tokens * slots, dtype=torch.bool, device=rows.device)
            seen[rows] = True
            if len(rows) != len(seen) or not bool(seen.all()):
                raise SiteError(f"{tokens} tokens should reach {slots} experts each, once; {len(rows)} rows did")
            return rows, torch.cat(self._inputs), torch.cat(self._outputs)
        if len(self._orders) > 1:
            raise SiteError(f"experts sort their rows once, not {len(self._orders)} times")
        rows = self._orders[0] if self._orders else torch.arange(tokens * slots, device=device)
        return rows, self._inputs[0].flatten(1), self._outputs[0]

    def dense(
        self, index: torch.Tensor, output: torch.Tensor, experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of experts that are given every token, row expert x tokens + token, as Llama4's are. Raises SiteError."""
        tokens = len(index)
        if self._products != 2 or self._inputs[0].shape[:2] != (experts, tokens) or len(output) != experts * tokens:
            raise SiteError(
                f"all {experts} experts should multiply {tokens} tokens twice; {self._products} products were seen"
            )
        chosen = (index * tokens + torch.arange(tokens, device=index.device)[:, None]).flatten()
        rows = torch.arange(index.numel(), device=index.device)
        return rows, self._inputs[0].flatten(0, 1)[chosen], output[chosen]
