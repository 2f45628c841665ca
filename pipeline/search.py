"""From features to captions: greedy and beam search, and sampling, batched over pictures.

No picture's result depends on the others in its batch. ``<unk>``, ``<pad>`` and ``<start>``
are never chosen, and a caption that reaches the longest length is closed with ``<end>``,
so that every search returns captions whatever the model wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.ensemble import CaptionDecoder
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
        consensus: weight of the agreement with similar pictures' captions, see ``reranking``.
        matching: weight of how well a caption fits the picture; with both 0 the decoder alone
            chooses.
    """

    beam_size: int = 3
    max_length: int = 20
    min_length: int = 1
    length_penalty: float = 0.9
    consensus: float = 0.0
    matching: float = 0.0


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


def search(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Caption features (B, 2048): for each picture its hypotheses, best first.

    There are ``beam_size`` of them, fewer only if the vocabulary allows no more.
    """
    if config.beam_size == 1:
        return [[hypothesis] for hypothesis in greedy_search(decoder, features, config)]
    return beam_search(decoder, features, config)


def _best_tokens(
    logits: Tensor, length: int, count: int, config: SearchConfig
) -> tuple[Tensor, Tensor]:
    """Choose the likeliest tokens that may come after ``length`` words.

    Args:
        logits: float32 (R, V); overwritten.
        length: words so far.
        count: tokens wanted.
        config: how to search.

    Returns:
        Log-probabilities, (R, min(count, V)), best first, -inf for forbidden ones, and tokens.
    """
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    best, tokens = _forbid(logits, length, config).topk(min(count, logits.shape[1]), dim=-1)
    return best - normaliser, tokens


def _forbid(logits: Tensor, length: int, config: SearchConfig) -> Tensor:
    """Set the logits (R, V) of what may not come after ``length`` words to -inf, in place."""
    if length >= config.max_length:
        end = logits[:, END_ID].clone()
        logits.fill_(-torch.inf)
        logits[:, END_ID] = end
    else:
        logits[:, FORBIDDEN] = -torch.inf
        if length < config.min_length:
            logits[:, END_ID] = -torch.inf
    return logits


@torch.inference_mode()
def greedy_search(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig
) -> list[Hypothesis]:
    """Take the likeliest next token each time: one hypothesis for each of features (B, 2048)."""
    batch = len(features)
    state = decoder.start(features)
    token = torch.full((batch,), START_ID, device=features.device)
    total = torch.zeros(batch, device=features.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=features.device)
    steps: list[Tensor] = []
    for length in range(config.max_length + 1):
        logits, state = decoder.step(token, state)
        best, tokens = _best_tokens(logits, length, 1, config)
        total += best[:, 0].masked_fill(finished, 0.0)
        token = tokens[:, 0].masked_fill(finished, PAD_ID)
        steps.append(token)
        finished |= token == END_ID
        if bool(finished.all()):
            break
    return _ended(steps, total, config)


@torch.inference_mode()
def beam_search(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Keep the ``beam_size`` likeliest openings of each picture; see ``search``.

    An opening that ends among the best ``beam_size`` continuations is a finished
    hypothesis; its place is taken by the next best that goes on. A picture is done when it
    has ``beam_size`` finished hypotheses, and then leaves the batch. With one beam this is
    greedy search.
    """
    beams, device = config.beam_size, features.device
    results: list[list[Hypothesis]] = [[] for _ in features]
    # Which pictures are still being searched; all that follows has a row for each of them.
    pictures = torch.arange(len(features), device=device)
    hidden, cell = (part.repeat_interleave(beams, 0) for part in decoder.start(features))
    token = torch.full((len(features) * beams,), START_ID, device=device)
    # All beams of a picture start alike, so only the first may grow in the first step.
    live = torch.full((len(features), beams), -torch.inf, device=device)
    live[:, 0] = 0.0
    words = torch.full((len(features), beams, config.max_length + 1), PAD_ID, device=device)
    pool = torch.full_like(live, -torch.inf)
    pool_total = torch.full_like(pool, -torch.inf)
    pool_words = torch.full_like(words, PAD_ID)
    # Enough: of the best continuations of one beam, and so at most one of each beam, one ends.
    candidates = 2 * beams

    for length in range(config.max_length + 1):
        batch = len(pictures)
        logits, (hidden, cell) = decoder.step(token, (hidden, cell))
        best, tokens = _best_tokens(logits, length, beams + 1, config)  # (B * K, K + 1)
        each = best.shape[1]
        totals = (live.view(-1, 1) + best).view(batch, beams * each)
        total, index = totals.topk(min(candidates, beams * each), dim=1)  # (B, 2K), best first
        parent, token_2k = index // each, tokens.view(batch, -1).gather(1, index)
        words_2k = _gather(words, parent)
        words_2k[:, :, length] = token_2k

        ends = token_2k == END_ID
        enters = ends & (torch.arange(total.shape[1], device=device) < beams)
        score = (total / (length + 1) ** config.length_penalty).masked_fill(~enters, -torch.inf)
        pool, kept = torch.cat([pool, score], 1).topk(beams, dim=1)
        pool_total = torch.cat([pool_total, total], 1).gather(1, kept)
        pool_words = _gather(torch.cat([pool_words, words_2k], 1), kept)

        live, kept = total.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        words, token = _gather(words_2k, kept), token_2k.gather(1, kept)
        chosen = torch.arange(batch, device=device).unsqueeze(1) * beams + parent.gather(1, kept)

        done = (pool > -torch.inf).all(dim=1)
        if length == config.max_length:
            done = torch.ones_like(done)
        if bool(done.any()):
            for picture, *found in zip(
                pictures[done].tolist(),
                pool_words[done].tolist(),
                pool_total[done].tolist(),
                pool[done].tolist(),
                strict=True,
            ):
                results[picture] = _hypotheses(*found)
            going = ~done
            pictures, live, words = pictures[going], live[going], words[going]
            pool, pool_total, pool_words = pool[going], pool_total[going], pool_words[going]
            token, chosen = token[going], chosen[going]
            if not len(pictures):
                break
        token, chosen = token.flatten(), chosen.flatten()
        hidden, cell = hidden.index_select(0, chosen), cell.index_select(0, chosen)
    return results


@torch.inference_mode()
def sample(
    decoder: CaptionDecoder, features: Tensor, count: int, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Draw ``count`` captions for each of features (B, 2048) from the model's distribution.

    Chance is torch's own (``torch.manual_seed``). Of ``config`` the lengths are used.

    Returns:
        For each picture its captions as they were drawn, not sorted; some may be the same.
    """
    rows, device = len(features) * count, features.device
    hidden, cell = (part.repeat_interleave(count, 0) for part in decoder.start(features))
    token = torch.full((rows,), START_ID, device=device)
    total = torch.zeros(rows, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    steps: list[Tensor] = []
    for length in range(config.max_length + 1):
        logits, (hidden, cell) = decoder.step(token, (hidden, cell))
        log_probabilities = logits.log_softmax(dim=-1)
        # Where the running sum of probabilities passes a random share of it: a number a row.
        sums = _forbid(logits, length, config).softmax(dim=-1).cumsum(dim=-1)
        place = torch.rand(rows, 1, device=device) * sums[:, -1:]
        drawn = torch.searchsorted(sums, place, right=True).clamp_(max=sums.shape[1] - 1)
        total += log_probabilities.gather(1, drawn)[:, 0].masked_fill(finished, 0.0)
        token = drawn[:, 0].masked_fill(finished, PAD_ID)
        steps.append(token)
        finished |= token == END_ID
        if bool(finished.all()):
            break
    hypotheses = _ended(steps, total, config)
    return [hypotheses[start : start + count] for start in range(0, rows, count)]


def _ended(steps: list[Tensor], totals: Tensor, config: SearchConfig) -> list[Hypothesis]:
    """Make hypotheses of the tokens (R,) of every step; each row has an <end>."""
    hypotheses = []
    for row, total in zip(torch.stack(steps, 1).tolist(), totals.tolist(), strict=True):
        words = row[: row.index(END_ID)]
        score = total / (len(words) + 1) ** config.length_penalty
        hypotheses.append(Hypothesis(words, total, score))
    return hypotheses


def _gather(sequences: Tensor, which: Tensor) -> Tensor:
    """Choose sequences of each picture: (B, N, T) by (B, M) gives (B, M, T)."""
    return sequences.gather(1, which.unsqueeze(2).expand(-1, -1, sequences.shape[2]))


def _hypotheses(
    words: list[list[int]], totals: list[float], scores: list[float]
) -> list[Hypothesis]:
    """Make hypotheses of one picture's pool, which is in the order of the scores."""
    return [
        Hypothesis(row[: row.index(END_ID)], total, score)
        for row, total, score in zip(words, totals, scores, strict=True)
        if score > -torch.inf
    ]
