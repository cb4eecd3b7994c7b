"""A model's perplexity on the corpus, from the hidden states of the captured forward pass.

The head is applied to slices of tokens, never to a whole sequence: logits of 2,048 tokens would take over a gigabyte
with a vocabulary of 150,000. The negative log-likelihood of each token given the earlier ones is summed per sequence in
float64; padding and the first token have none. Knows tensors, nothing of files.
"""

from __future__ import annotations

from typing import Any

import torch

SLICE_BYTES = 64 * 1024 * 1024
"""Bytes of float32 logits at once; each slice reads the weights of the head once. Chosen, not tuned."""


class Head:
    """The language-model head of a model, with the operations of its own forward on the logits."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.linear: torch.nn.Module = model.get_output_embeddings()
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        self.divisor = getattr(config, "logits_scaling", None)  # Granite
        self.vocabulary = int(config.vocab_size)
        self.slice_tokens = max(1, SLICE_BYTES // (4 * self.vocabulary))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits (token, vocabulary) of hidden states (token, hidden)."""
        logits: torch.Tensor = self.linear(hidden)
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.float()


def losses(head: Head, hidden: torch.Tensor, ids: torch.Tensor, lengths: tuple[int, ...]) -> list[tuple[float, int]]:
    """(sum of negative log-likelihoods in nats, tokens it is over) of each sequence.

    hidden: (sequence, position, hidden), after the final norm. ids: (sequence, position) int64. A sequence of n tokens
    predicts n - 1 of them.
    """
    found = []
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            for start in range(0, length - 1, head.slice_tokens):
                stop = min(start + head.slice_tokens, length - 1)
                logits = head.logits(hidden[row, start:stop])
                targets = ids[row, start + 1 : stop + 1].to(logits.device)
                each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                total += each.double().sum().to(total.device)
            found.append((total, length - 1))
    # one synchronization for each batch, after all its work is queued
    return [(float(total), count) for total, count in found]
