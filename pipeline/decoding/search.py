"""Greedy and beam search from features to captions, batched over images.

No image's result depends on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID
from pipeline.decoding.hypothesis import (
    Hypothesis,
    forbid_tokens,
    make_hypotheses,
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
    """Caption features (B, 2048): for each image its hypotheses, best first.

    There are ``beam_size`` of them; fewer if the vocabulary allows no more, or if the same
    caption was drawn twice.

    Args:
        decoder: on the device of ``features``.
        features: of the images.
        config: how to search.
        keys: a number per image, which with the seed decides what is drawn; by default the
            positions in the batch.
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

    Args:
        logits: float32 (R, V); overwritten.
        length: words so far.
        count: tokens wanted.
        config: how to search.
        penalty: (R, V), taken from the log-probabilities.

    Returns:
        Log-probabilities, (R, min(count, V)), best first, -inf for forbidden ones, and tokens.
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
    """Return one hypothesis for each of features (B, 2048): the likeliest token at each step."""
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
    return make_hypotheses(steps, total, config)


@torch.inference_mode()
def beam_search(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    penalty: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Keep the ``beam_size`` likeliest prefixes of each image; see ``search``.

    A prefix that ends among the best ``beam_size`` continuations is a finished hypothesis; the
    next best that does not end takes its place. An image is done when it has ``beam_size``
    finished hypotheses, and leaves the batch. With one beam this is greedy search.

    A ``penalty`` (B, max_length + 1, V) is subtracted from the log-probabilities of the tokens at
    each position to choose the beams; the hypotheses' own log-probabilities are without it.
    """
    beams, device = config.beam_size, features.device
    results: list[list[Hypothesis]] = [[] for _ in features]
    # The images still being searched; the tensors below have a row for each of them.
    images = torch.arange(len(features), device=device)
    hidden, cell = (part.repeat_interleave(beams, 0) for part in decoder.start(features))
    token = torch.full((len(features) * beams,), START_ID, device=device)
    # All beams of an image start alike, so only the first may be continued in the first step.
    live = torch.full((len(features), beams), -torch.inf, device=device)
    live[:, 0] = 0.0
    words = torch.full((len(features), beams, config.max_length + 1), PAD_ID, device=device)
    finished = torch.full_like(live, -torch.inf)
    finished_total = torch.full_like(finished, -torch.inf)
    finished_words = torch.full_like(words, PAD_ID)
    # Enough: of the best continuations of one beam, and so at most one of each beam, one ends.
    candidates = 2 * beams

    for length in range(config.max_length + 1):
        batch = len(images)
        logits, (hidden, cell) = decoder.step(token, (hidden, cell))
        penalties = None
        if penalty is not None:
            penalties = penalty[images, length].repeat_interleave(beams, 0)
        best, tokens = _best_tokens(logits, length, beams + 1, config, penalties)  # (B * K, K + 1)
        each = best.shape[1]
        totals = (live.view(-1, 1) + best).view(batch, beams * each)
        total, index = totals.topk(min(candidates, beams * each), dim=1)  # (B, 2K), best first
        parent, token_2k = index // each, tokens.view(batch, -1).gather(1, index)
        words_2k = _gather(words, parent)
        words_2k[:, :, length] = token_2k

        ends = token_2k == END_ID
        enters = ends & (torch.arange(total.shape[1], device=device) < beams)
        score = (total / (length + 1) ** config.length_penalty).masked_fill(~enters, -torch.inf)
        finished, kept = torch.cat([finished, score], 1).topk(beams, dim=1)
        finished_total = torch.cat([finished_total, total], 1).gather(1, kept)
        finished_words = _gather(torch.cat([finished_words, words_2k], 1), kept)

        live, kept = total.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        words, token = _gather(words_2k, kept), token_2k.gather(1, kept)
        chosen = torch.arange(batch, device=device).unsqueeze(1) * beams + parent.gather(1, kept)

        done = (finished > -torch.inf).all(dim=1)
        if length == config.max_length:
            done = torch.ones_like(done)
        if bool(done.any()):
            for image, *found in zip(
                images[done].tolist(),
                finished_words[done].tolist(),
                finished_total[done].tolist(),
                finished[done].tolist(),
                strict=True,
            ):
                results[image] = [
                    Hypothesis(row[: row.index(END_ID)], total, score)
                    for row, total, score in zip(*found, strict=True)
                    if score > -torch.inf
                ]
            going = ~done
            images, live, words = images[going], live[going], words[going]
            finished, finished_total = finished[going], finished_total[going]
            finished_words = finished_words[going]
            token, chosen = token[going], chosen[going]
            if not len(images):
                break
        token, chosen = token.flatten(), chosen.flatten()
        hidden, cell = hidden.index_select(0, chosen), cell.index_select(0, chosen)
    if penalty is None:
        return results
    return [
        _unpenalised(group, own, config) for group, own in zip(results, penalty.cpu(), strict=True)
    ]


def _unpenalised(
    group: Sequence[Hypothesis], penalty: Tensor, config: SearchConfig
) -> list[Hypothesis]:
    """Return hypotheses without a penalty (max_length + 1, V) in their scores, best first."""
    corrected = []
    for hypothesis in group:
        tokens = hypothesis.tokens
        paid = float(penalty[range(len(tokens) + 1), [*tokens, END_ID]].sum())
        corrected.append(make_hypothesis(tokens, hypothesis.log_probability + paid, config))
    return sorted(corrected, key=lambda hypothesis: hypothesis.score, reverse=True)


def _gather(sequences: Tensor, which: Tensor) -> Tensor:
    """Choose sequences of each image: (B, N, T) by (B, M) gives (B, M, T)."""
    return sequences.gather(1, which.unsqueeze(2).expand(-1, -1, sequences.shape[2]))
