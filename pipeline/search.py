"""From features to captions: greedy and beam search, batched over pictures and hypotheses.

No picture's result depends on the others in its batch. ``<unk>``, ``<pad>`` and ``<start>``
are never chosen, and a caption that reaches the longest length is closed with ``<end>``,
so that every search returns captions whatever the model wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoder import Decoder
from pipeline.vocabulary import END_ID, PAD_ID, START_ID, UNKNOWN_ID

FORBIDDEN = (PAD_ID, START_ID, UNKNOWN_ID)


@dataclass(frozen=True)
class SearchConfig:
    """How captions are searched.

    Attributes:
        beam_size: hypotheses kept a picture; 1 is greedy search.
        max_length: most words in a caption.
        min_length: fewest words in a caption.
        length_penalty: the exponent a in score = log p / (words + 1)^a. 0 prefers short
            captions, as the sum of log-probabilities does; 1 compares means.
    """

    beam_size: int = 3
    max_length: int = 20
    min_length: int = 1
    length_penalty: float = 0.9


@dataclass(frozen=True)
class Hypothesis:
    """One caption that a search found.

    Attributes:
        tokens: word ids, without <start> and <end>.
        log_probability: of the words and the <end>, summed, under the model, in nats.
        score: what hypotheses are ranked by: the log-probability, length-normalised.
    """

    tokens: list[int]
    log_probability: float
    score: float


def search(decoder: Decoder, features: Tensor, config: SearchConfig) -> list[list[Hypothesis]]:
    """Caption features (B, 2048): for each picture its hypotheses, best first.

    There are ``beam_size`` of them, fewer only if the vocabulary allows no more.
    """
    if config.beam_size == 1:
        return [[hypothesis] for hypothesis in greedy_search(decoder, features, config)]
    return beam_search(decoder, features, config)


def _restrict(log_probabilities: Tensor, length: int, config: SearchConfig) -> Tensor:
    """Give -inf to the tokens that may not come after ``length`` words."""
    if length >= config.max_length:
        only_end = torch.full_like(log_probabilities, -torch.inf)
        only_end[:, END_ID] = log_probabilities[:, END_ID]
        return only_end
    log_probabilities[:, FORBIDDEN] = -torch.inf
    if length < config.min_length:
        log_probabilities[:, END_ID] = -torch.inf
    return log_probabilities


@torch.inference_mode()
def greedy_search(decoder: Decoder, features: Tensor, config: SearchConfig) -> list[Hypothesis]:
    """Take the likeliest next token each time: one hypothesis for each of features (B, 2048)."""
    batch = len(features)
    state = decoder.start(features)
    token = torch.full((batch,), START_ID, device=features.device)
    total = torch.zeros(batch, device=features.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=features.device)
    steps: list[Tensor] = []
    for length in range(config.max_length + 1):
        log_probabilities, state = decoder.step(token, state)
        best, token = _restrict(log_probabilities, length, config).max(dim=-1)
        total += best.masked_fill(finished, 0.0)
        token = token.masked_fill(finished, PAD_ID)
        steps.append(token)
        finished |= token == END_ID
        if bool(finished.all()):
            break
    hypotheses = []
    for row, log_probability in zip(torch.stack(steps, 1).tolist(), total.tolist(), strict=True):
        words = row[: row.index(END_ID)]
        score = log_probability / (len(words) + 1) ** config.length_penalty
        hypotheses.append(Hypothesis(words, log_probability, score))
    return hypotheses


@torch.inference_mode()
def beam_search(decoder: Decoder, features: Tensor, config: SearchConfig) -> list[list[Hypothesis]]:
    """Keep the ``beam_size`` likeliest openings of each picture; see ``search``.

    An opening that ends among the best ``beam_size`` continuations is a finished
    hypothesis; its place is taken by the next best that goes on. A picture is done when it
    has ``beam_size`` finished hypotheses. With one beam this is greedy search.
    """
    batch, beams, device = len(features), config.beam_size, features.device
    vocabulary = decoder.config.vocabulary_size
    first_beam = torch.arange(batch, device=device).unsqueeze(1) * beams  # (B, 1)

    hidden, cell = decoder.start(features)
    state = (hidden.repeat_interleave(beams, 1), cell.repeat_interleave(beams, 1))
    token = torch.full((batch * beams,), START_ID, device=device)
    # All beams of a picture start alike, so only the first may grow in the first step.
    live = torch.full((batch, beams), -torch.inf, device=device)
    live[:, 0] = 0.0
    words = torch.full((batch, beams, config.max_length + 1), PAD_ID, device=device)
    pool = torch.full((batch, beams), -torch.inf, device=device)
    pool_total = torch.full((batch, beams), -torch.inf, device=device)
    pool_words = torch.full_like(words, PAD_ID)
    candidates = 2 * beams  # enough: at most one candidate of each beam ends

    for length in range(config.max_length + 1):
        log_probabilities, state = decoder.step(token, state)
        log_probabilities = _restrict(log_probabilities, length, config)
        totals = live.unsqueeze(2) + log_probabilities.view(batch, beams, vocabulary)
        total, index = totals.flatten(1).topk(candidates, dim=1)  # (B, 2K), best first
        parent, token_2k = index // vocabulary, index % vocabulary
        words_2k = words.gather(1, parent.unsqueeze(2).expand(-1, -1, words.shape[2])).clone()
        words_2k[:, :, length] = token_2k

        ends = token_2k == END_ID
        enters = ends & (torch.arange(candidates, device=device) < beams)
        enters &= ~(pool > -torch.inf).all(dim=1, keepdim=True)  # a done picture stays as it is
        score = (total / (length + 1) ** config.length_penalty).masked_fill(~enters, -torch.inf)
        pool, kept = torch.cat([pool, score], 1).topk(beams, dim=1)
        pool_total = torch.cat([pool_total, total], 1).gather(1, kept)
        pool_words = torch.cat([pool_words, words_2k], 1).gather(
            1, kept.unsqueeze(2).expand(-1, -1, words.shape[2])
        )
        if bool((pool > -torch.inf).all()):
            break

        live, kept = total.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        words = words_2k.gather(1, kept.unsqueeze(2).expand(-1, -1, words.shape[2]))
        token = token_2k.gather(1, kept).flatten()
        chosen = (first_beam + parent.gather(1, kept)).flatten()
        state = (state[0].index_select(1, chosen), state[1].index_select(1, chosen))

    results = []
    for scores, log_ps, rows in zip(
        pool.tolist(), pool_total.tolist(), pool_words.tolist(), strict=True
    ):
        results.append(
            [
                Hypothesis(row[: row.index(END_ID)], log_p, score)
                for score, log_p, row in zip(scores, log_ps, rows, strict=True)
                if score > -torch.inf
            ]
        )
    return results
