"""Greedy and beam search from features to captions, batched over images.

No image's result depends on the others in its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID
from pipeline.decoding.hypothesis import (
    Hypothesis,
    best_first,
    forbid_tokens,
    generate,
    make_hypothesis,
)
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.sampling import draw_captions
from pipeline.models.ensemble import CaptionDecoder


def search(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    keys: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Return the hypotheses for each row of features (B, 2048), best first.

    There are ``beam_size`` per image, or fewer if the vocabulary allows no more or a caption was
    drawn twice. ``keys``, one number per image, determine together with the seed what is drawn; by
    default they are the positions in the batch.
    """
    if config.sampling:
        return draw_captions(decoder, features, config, keys or range(len(features)))
    if config.beam_size == 1:
        return [[hypothesis] for hypothesis in greedy_search(decoder, features, config)]
    return beam_search(decoder, features, config)


def _best_tokens(
    logits: Tensor, length: int, count: int, config: SearchConfig, penalty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the likeliest tokens that may come after ``length`` words.

    ``penalty`` (R, V) is subtracted from the log-probabilities; ``logits`` (R, V) are overwritten.

    Returns:
        Log-probabilities, best first, -inf if forbidden, and tokens, each (R, min(count, V)).
    """
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    if penalty is not None:
        logits -= penalty
    best, tokens = forbid_tokens(logits, length, config).topk(min(count, logits.shape[1]), dim=-1)
    return best - normaliser, tokens


@torch.inference_mode()
def greedy_search(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig
) -> list[Hypothesis]:
    """Return one hypothesis per row of features (B, 2048): the likeliest token at each step."""
    likeliest = functools.partial(_best_tokens, count=1, config=config)
    return generate(decoder, decoder.start(features), config, likeliest)


@torch.inference_mode()
def beam_search(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    penalty: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Keep the ``beam_size`` likeliest prefixes of each image; see ``search``.

    A prefix that ends among the best ``beam_size`` continuations is a finished hypothesis; the
    next best that does not end takes its place. An image leaves the batch once it has
    ``beam_size`` finished hypotheses. With one beam this is greedy search.

    A ``penalty`` (B, max_length + 1, V) is subtracted from the token log-probabilities at each
    position when choosing beams, but the log-probabilities of the results do not include it.
    """
    beams, device = config.beam_size, features.device
    results: list[list[Hypothesis]] = [[] for _ in features]
    # The images still being searched; the tensors below have a row for each of them.
    images = torch.arange(len(features), device=device)
    hidden, cell = (part.repeat_interleave(beams, 0) for part in decoder.start(features))
    token = torch.full((len(features), beams), START_ID, device=device)
    # All beams of an image start out identical, so the first step extends only the first one.
    live = torch.full((len(features), beams), -torch.inf, device=device)
    live[:, 0] = 0.0
    words = torch.full((len(features), beams, config.max_length + 1), PAD_ID, device=device)
    score = torch.full_like(live, -torch.inf)  # of finished hypotheses, and their totals and words
    score_total, score_words = score, words

    for length in range(config.max_length + 1):
        logits, (hidden, cell) = decoder.step(token.flatten(), (hidden, cell))
        penalties = None
        if penalty is not None:
            penalties = penalty[images, length].repeat_interleave(beams, 0)
        best, tokens = _best_tokens(logits, length, beams + 1, config, penalties)  # (B * K, K + 1)
        each = best.shape[1]
        totals = (live.view(-1, 1) + best).view(len(images), beams * each)
        # 2K suffice: at most one continuation of each beam ends.
        total, index = totals.topk(min(2 * beams, beams * each), dim=1)  # (B, 2K), best first
        parent, token = index // each, tokens.view(len(images), -1).gather(1, index)
        words = _gather(words, parent)
        words[:, :, length] = token

        ends = token == END_ID
        enters = ends & (torch.arange(total.shape[1], device=device) < beams)
        new = (total / (length + 1) ** config.length_penalty).masked_fill(~enters, -torch.inf)
        score, kept = torch.cat([score, new], 1).topk(beams, dim=1)
        score_total = torch.cat([score_total, total], 1).gather(1, kept)
        score_words = _gather(torch.cat([score_words, words], 1), kept)

        live, kept = total.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        words, token, parent = _gather(words, kept), token.gather(1, kept), parent.gather(1, kept)
        chosen = torch.arange(len(images), device=device).unsqueeze(1) * beams + parent

        done = (score > -torch.inf).all(dim=1) | (length == config.max_length)
        if bool(done.any()):
            found = _hypotheses(score_words[done], score_total[done], score[done])
            for image, group in zip(images[done].tolist(), found, strict=True):
                results[image] = group
            rows = images, live, words, score, score_total, score_words, token, chosen
            images, live, words, score, score_total, score_words, token, chosen = (
                part[~done] for part in rows
            )
            if not len(images):
                break
        hidden, cell = (part.index_select(0, chosen.flatten()) for part in (hidden, cell))
    if penalty is None:
        return results
    return [
        _unpenalised(group, own, config) for group, own in zip(results, penalty.cpu(), strict=True)
    ]


def _hypotheses(words: Tensor, totals: Tensor, scores: Tensor) -> list[list[Hypothesis]]:
    """Return the finished hypotheses of each image: words (B, K, T), totals and scores (B, K)."""
    return [
        [
            Hypothesis(row[: row.index(END_ID)], total, score)
            for row, total, score in zip(*group, strict=True)
            if score > -torch.inf
        ]
        for group in zip(words.tolist(), totals.tolist(), scores.tolist(), strict=True)
    ]


def _unpenalised(
    group: Sequence[Hypothesis], penalty: Tensor, config: SearchConfig
) -> list[Hypothesis]:
    """Remove a penalty (max_length + 1, V) from the scores; return the hypotheses best first."""
    corrected = []
    for hypothesis in group:
        tokens = hypothesis.tokens
        paid = float(penalty[range(len(tokens) + 1), [*tokens, END_ID]].sum())
        corrected.append(make_hypothesis(tokens, hypothesis.log_probability + paid, config))
    return best_first(corrected)


def _gather(sequences: Tensor, which: Tensor) -> Tensor:
    """Select sequences of each image: (B, N, T) indexed by (B, M) gives (B, M, T)."""
    return sequences.gather(1, which.unsqueeze(2).expand(-1, -1, sequences.shape[2]))
