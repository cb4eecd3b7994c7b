"""A changed pass against the untouched one: losses, top-1 probability and agreement, and KL, in float64 a sequence.

The head is applied to slices of tokens, never to a whole sequence. The untouched pass's log-probabilities of a slice are
computed once for a group of changes, which takes K + 1 heads for K changes. Padding and the last token, which predicts
nothing that is known, are not counted. Knows tensors, nothing of hooks or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outliers.capture.perplexity import Head
from outliers.study.probe_memory import slice_tokens


@dataclass(frozen=True)
class Measures:
    """Sums over the `tokens` of one sequence that predict a known token: nats, probabilities, and a number of tokens.

    kl: of the untouched distribution from the changed one, sum p log(p / q). agreement: tokens whose most likely next token is
    the same.
    """

    nll: float
    tokens: int
    top1_probability: float
    agreement: int
    kl: float


@dataclass
class _Sums:
    nll: torch.Tensor
    top1: torch.Tensor
    agreement: torch.Tensor
    kl: torch.Tensor

    @classmethod
    def zero(cls, device: torch.device) -> _Sums:
        def none(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        return cls(none(torch.float64), none(torch.float64), none(torch.int64), none(torch.float64))


@dataclass
class _Slice:
    """The distribution over the next token at some positions. logits: (token, vocabulary) float64."""

    logits: torch.Tensor
    total: torch.Tensor
    best: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> _Slice:
        wide = logits.double()
        return cls(wide, torch.logsumexp(wide, -1), wide.argmax(-1))

    def add_to(self, sums: _Sums, targets: torch.Tensor) -> None:
        own = self.logits.gather(-1, targets[:, None])[:, 0]
        sums.nll += (self.total - own).sum()
        sums.top1 += (self.logits.gather(-1, self.best[:, None])[:, 0] - self.total).exp().sum()


def compare(
    head: Head,
    untouched: torch.Tensor,
    changed: Sequence[torch.Tensor],
    ids: torch.Tensor,
    lengths: tuple[int, ...],
) -> tuple[list[Measures], list[list[Measures]]]:
    """Measures of each sequence for the untouched pass, and for each change.

    untouched, changed: (sequence, position, hidden), after the final norm. ids: (sequence, position) int64.
    """
    step = slice_tokens(head.vocabulary)
    first: list[tuple[_Sums, int]] = []
    others: list[list[tuple[_Sums, int]]] = [[] for _ in changed]
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            sums = [_Sums.zero(untouched.device) for _ in range(1 + len(changed))]
            for start in range(0, length - 1, step):
                at = slice(start, min(start + step, length - 1))
                targets = ids[row, at.start + 1 : at.stop + 1].to(untouched.device)
                _add_slice(head, sums, untouched[row, at], [hidden[row, at] for hidden in changed], targets)
            first.append((sums[0], length - 1))
            for own, total in zip(others, sums[1:], strict=True):
                own.append((total, length - 1))
    return [_read(*one) for one in first], [[_read(*one) for one in own] for own in others]


def _add_slice(
    head: Head, sums: list[_Sums], untouched: torch.Tensor, changed: list[torch.Tensor], targets: torch.Tensor
) -> None:
    reference = _Slice.of(head.logits(untouched).to(untouched.device))
    reference.add_to(sums[0], targets)
    sums[0].agreement += targets.shape[0]
    p = (reference.logits - reference.total[:, None]).exp_()
    for total, hidden in zip(sums[1:], changed, strict=True):
        own = _Slice.of(head.logits(hidden).to(untouched.device))
        own.add_to(total, targets)
        total.agreement += (own.best == reference.best).sum()
        # sum p (log p - log q); where nothing is changed each term is exactly 0
        apart = ((reference.logits - own.logits) * p).sum(-1)
        total.kl += (apart + (own.total - reference.total)).sum()


def _read(sums: _Sums, tokens: int) -> Measures:
    return Measures(float(sums.nll), tokens, float(sums.top1), int(sums.agreement), float(sums.kl))
