"""Changes what one expert of a layer receives, and nothing of what the other experts of the same tokens do.

The experts of a layer are one module with one input, so the change is made inside of it, before the first projection: a
TorchFunctionMode, open while the module runs, puts changed rows in the place of those of the expert's tokens. Which rows these
are is read as `experts.record` reads it: `where` (eager), the order of `sort` (grouped_mm), the plain order (batched_mm), or a
copy an expert (Llama 4). Every row is compared with what the token was before it is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from outliers.errors import SiteError
from outliers.experts.record import PRODUCT, SORT, WHERE, role_of
from outliers.probe.edits import Edit, Pass, Scores, SharedEdit
from outliers.probe.readers import Reader
from outliers.probe.silence import routing_of


@contextlib.contextmanager
def edited_experts(readers: Mapping[int, Reader], edits: Mapping[int, tuple[int, Edit]], now: Pass) -> Iterator[None]:
    """In the block one expert of each layer in `edits` receives what its edit gives.

    readers: layer -> its module of experts, as a reader of mlp_in. edits: layer -> (expert, edit of the module's input). Raises
    SiteError, in the pass, where the rows of the expert can't be found.
    """
    handles: list[Any] = []
    try:
        for layer, (expert, edit) in edits.items():
            reader, scores = readers[layer], Scores()
            mode = _FirstProducts(expert, reader)
            before = _before(layer, reader, SharedEdit(edit, now), scores, mode, now)
            if reader.scores is not None:
                handles.append(reader.scores.register_forward_hook(scores.after))
            handles.append(reader.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(reader.module.register_forward_hook(_behind(mode), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(
    layer: int, reader: Reader, shared: SharedEdit, scores: Scores, mode: _FirstProducts, now: Pass
) -> Callable[..., None]:
    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index, _ = routing_of(module, args, kwargs, layer, now)
        value = args[reader.argument] if isinstance(reader.argument, int) else kwargs[reader.argument]
        made = shared.changed(value, scores.scale if reader.scores is not None else None, reader)
        mode.begin(value, made, index, now.sequences * now.positions)

    return before


def _behind(mode: _FirstProducts) -> Callable[..., None]:
    def behind(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        if mode.end() and output is not None:  # None: the module has raised
            mode.check()

    return behind


class _FirstProducts(TorchFunctionMode):
    """Changes the rows of one expert in each first product of matrices."""

    def __init__(self, expert: int, reader: Reader) -> None:
        super().__init__()
        self._expert, self._path = expert, reader.path
        self._open = False

    def begin(self, given: torch.Tensor, made: torch.Tensor, index: torch.Tensor | None, tokens: int) -> None:
        """given, made: the module's input, and the changed one. index: the chosen experts, (token, slot); None: a copy each."""
        self._given, self._made = (x.reshape(-1, x.shape[-1]) for x in (given, made))
        self._index, self._tokens = index, tokens
        self._place: tuple[torch.Tensor, torch.Tensor] | None = None
        self._order: torch.Tensor | None = None
        self._products = self._rows = 0
        self._open = True
        self.__enter__()  # type: ignore[no-untyped-call]  # torch gives it no types; a pre-hook opens, a hook closes

    def end(self) -> bool:
        """Change nothing from here on; returns whether the mode was open."""
        was, self._open = self._open, False
        if was:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above
        return was

    def check(self) -> None:
        """Raise SiteError where other rows were changed than those of the expert's tokens; let go of the tensors."""
        wanted = self._tokens if self._index is None else int((self._index == self._expert).sum())
        rows = self._rows
        del self._given, self._made
        if rows != wanted:
            raise self._wrong(f"{rows} of the rows of its {wanted} tokens were found")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, a first product with changed rows."""
        role = role_of(func)
        if role == PRODUCT:
            self._products += 1
            if self._products % 2:
                args = self._replaced(func, args)
        result = func(*args, **kwargs) if kwargs else func(*args)
        if role == WHERE:
            self._place = result
        elif role == SORT:
            self._order = result[1]
        return result

    def _replaced(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # bmm(weight, input) where weights are not transposed: the input is a single column
        at = 1 if func is torch.bmm and args[1].shape[-1] == 1 else 0
        rows, tokens = self._own(args[at])
        if not tokens.numel():
            return args
        changed = args[at].clone()
        flat = changed.reshape(-1, self._given.shape[-1])
        if not torch.equal(flat[rows], self._given[tokens]):
            raise self._wrong("its first product gets other rows than the module does")
        flat[rows] = self._made[tokens]
        self._rows += tokens.numel()
        return (*args[:at], flat.view(args[at].shape), *args[at + 1 :])

    def _own(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of the product's input that are the expert's, rows of the module's input that these were)."""
        index, here = self._index, x.device
        if index is None:
            own = torch.arange(self._expert * self._tokens, (self._expert + 1) * self._tokens, device=here)
            return own, own
        if self._place is not None:
            slot, token = self._place
            mine = token.numel() > 0 and int(index[token[0], slot[0]]) == self._expert
            return (torch.arange(token.numel(), device=here), token) if mine else (token[:0], token[:0])
        order = torch.arange(index.numel(), device=here) if self._order is None else self._order
        rows = (index.flatten()[order] == self._expert).nonzero().flatten()
        return rows, order[rows] // index.shape[1]

    def _wrong(self, what: str) -> SiteError:
        return SiteError(
            f"expert {self._expert} of {self._path} can't be changed alone: {what}; leave --map-experts out"
        )
