"""Hypotheses, and the rules that every search keeps.

``<unk>``, ``<pad>`` and ``<start>`` are never chosen, and a caption that reaches the longest
length is closed with ``<end>``, so that every search returns captions whatever the model's
probabilities are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, UNKNOWN_ID
from pipeline.decoding.options import SearchConfig

FORBIDDEN = (PAD_ID, START_ID, UNKNOWN_ID)


@dataclass(frozen=True)
class Hypothesis:
    """One caption that a search found.

    Attributes:
        tokens: token ids, without <start> and <end>.
        log_probability: of the tokens and the <end> under the model, in nats.
        score: the length-normalised log-probability, plus what rerankers add; the highest wins.
    """

    tokens: list[int]
    log_probability: float
    score: float


def make_hypothesis(tokens: list[int], total: float, config: SearchConfig) -> Hypothesis:
    """Return a hypothesis with its length-normalised score."""
    return Hypothesis(tokens, total, total / (len(tokens) + 1) ** config.length_penalty)


def make_hypotheses(steps: list[Tensor], totals: Tensor, config: SearchConfig) -> list[Hypothesis]:
    """Return a hypothesis per row of the tokens (R,) of every step; each row has an <end>."""
    return [
        make_hypothesis(row[: row.index(END_ID)], total, config)
        for row, total in zip(torch.stack(steps, 1).tolist(), totals.tolist(), strict=True)
    ]


def forbid_tokens(logits: Tensor, length: int, config: SearchConfig) -> Tensor:
    """Set the logits (R, V) of tokens that must not follow ``length`` words to -inf, in place."""
    forced = length < len(config.prefix)
    if forced or length >= config.max_length:
        only = config.prefix[length] if forced else END_ID
        kept = logits[:, only].clone()
        logits.fill_(-torch.inf)
        logits[:, only] = kept
    else:
        logits[:, FORBIDDEN] = -torch.inf
        if length < config.min_length:
            logits[:, END_ID] = -torch.inf
    return logits
