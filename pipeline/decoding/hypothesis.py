"""What all searches share: hypotheses, the rules for allowed tokens, and the generation loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, UNKNOWN_ID
from pipeline.decoding.options import SearchConfig
from pipeline.models.decoder import State
from pipeline.models.ensemble import CaptionDecoder

FORBIDDEN = (PAD_ID, START_ID, UNKNOWN_ID)


@dataclass(frozen=True)
class Hypothesis:
    """One caption that a search found.

    Attributes:
        tokens: token ids, without <start> and <end>.
        log_probability: of the tokens and the <end> under the model, in nats.
        score: the length-normalised log-probability, plus what rerankers add; the highest wins.
        added: what each reranker added to the score, by reranker name.
    """

    tokens: list[int]
    log_probability: float
    score: float
    added: Mapping[str, float] = field(default_factory=dict)


def make_hypothesis(tokens: list[int], total: float, config: SearchConfig) -> Hypothesis:
    """Return a hypothesis with its length-normalised score."""
    return Hypothesis(tokens, total, total / (len(tokens) + 1) ** config.length_penalty)


def best_first(hypotheses: Iterable[Hypothesis]) -> list[Hypothesis]:
    """Sort hypotheses by score."""
    return sorted(hypotheses, key=lambda hypothesis: hypothesis.score, reverse=True)


def add_scores(
    group: Sequence[Hypothesis], scores: Sequence[float], reranker: str
) -> list[Hypothesis]:
    """Return hypotheses with a reranker's ``scores`` added to their own, best first."""
    return best_first(
        replace(h, score=h.score + s, added={**h.added, reranker: s})
        for h, s in zip(group, scores, strict=True)
    )


def forbid_tokens(logits: Tensor, length: int, config: SearchConfig) -> Tensor:
    """Set the logits (R, V) of tokens that must not follow ``length`` words to -inf, in place.

    At the maximum length only <end> may follow, so every search returns captions whatever the
    model's probabilities.
    """
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


@torch.inference_mode()
def generate(
    decoder: CaptionDecoder,
    state: State,
    config: SearchConfig,
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> list[Hypothesis]:
    """Generate one caption for each row of a state, token by token.

    ``choose`` takes logits (R, V) and the number of words so far, and returns the chosen tokens'
    log-probabilities and the tokens, each (R, 1).
    """
    rows, device = len(state[0]), state[0].device
    token = torch.full((rows,), START_ID, device=device)
    total = torch.zeros(rows, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    steps: list[Tensor] = []
    for length in range(config.max_length + 1):
        logits, state = decoder.step(token, state)
        log_probability, chosen = choose(logits, length)
        total += log_probability[:, 0].masked_fill(finished, 0.0)
        token = chosen[:, 0].masked_fill(finished, PAD_ID)
        steps.append(token)
        finished |= token == END_ID
        if bool(finished.all()):
            break
    return [
        make_hypothesis(tokens[: tokens.index(END_ID)], log_probability, config)
        for tokens, log_probability in zip(
            torch.stack(steps, 1).tolist(), total.tolist(), strict=True
        )
    ]
