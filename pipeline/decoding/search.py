"""From features to captions: greedy and beam search, and sampling, batched over images.

No image's result depends on the others in its batch. ``<unk>``, ``<pad>`` and ``<start>``
are never chosen, and a caption that reaches the longest length is closed with ``<end>``,
so that every search returns captions whatever the model wants.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, UNKNOWN_ID
from pipeline.decoding.options import SearchConfig
from pipeline.models.ensemble import CaptionDecoder

FORBIDDEN = (PAD_ID, START_ID, UNKNOWN_ID)


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
        keys: a number for each image: with the seed it decides what is drawn, whatever else is
            in the batch. By default their places in the batch.
    """
    if config.sampling:
        places = range(len(features)) if keys is None else keys
        size = config.beam_size, config.max_length + 1
        chance = torch.stack([_chance(config.seed, key, size) for key in places])
        drawn = sample(decoder, features, config.beam_size, config, chance.to(features.device))
        return [_distinct(group) for group in drawn]
    if config.beam_size == 1:
        return [[hypothesis] for hypothesis in greedy_search(decoder, features, config)]
    return beam_search(decoder, features, config)


def _chance(seed: int, key: int, size: tuple[int, ...]) -> Tensor:
    """Give random numbers from 0 to 1 that depend on ``seed`` and ``key`` alone."""
    # torch takes only 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    return torch.rand(size, generator=generator)


def _distinct(group: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Keep one of each caption, best first."""
    kept = {tuple(hypothesis.tokens): hypothesis for hypothesis in group}
    return sorted(kept.values(), key=lambda hypothesis: hypothesis.score, reverse=True)


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
    best, tokens = _forbid(logits, length, config).topk(min(count, logits.shape[1]), dim=-1)
    return best - normaliser, tokens


def _forbid(logits: Tensor, length: int, config: SearchConfig) -> Tensor:
    """Set the logits (R, V) of what may not come after ``length`` words to -inf, in place."""
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
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    penalty: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Keep the ``beam_size`` likeliest openings of each image; see ``search``.

    An opening that ends among the best ``beam_size`` continuations is a finished
    hypothesis; its place is taken by the next best that goes on. An image is done when it
    has ``beam_size`` finished hypotheses, and then leaves the batch. With one beam this is
    greedy search.

    A ``penalty`` (B, max_length + 1, V) is taken from the log-probabilities of the tokens at each
    place while it is decided which beams to keep; those of the hypotheses are without it.
    """
    beams, device = config.beam_size, features.device
    results: list[list[Hypothesis]] = [[] for _ in features]
    # Which images are still being searched; all that follows has a row for each of them.
    images = torch.arange(len(features), device=device)
    hidden, cell = (part.repeat_interleave(beams, 0) for part in decoder.start(features))
    token = torch.full((len(features) * beams,), START_ID, device=device)
    # All beams of an image start alike, so only the first may grow in the first step.
    live = torch.full((len(features), beams), -torch.inf, device=device)
    live[:, 0] = 0.0
    words = torch.full((len(features), beams, config.max_length + 1), PAD_ID, device=device)
    pool = torch.full_like(live, -torch.inf)
    pool_total = torch.full_like(pool, -torch.inf)
    pool_words = torch.full_like(words, PAD_ID)
    # Enough: of the best continuations of one beam, and so at most one of each beam, one ends.
    candidates = 2 * beams

    for length in range(config.max_length + 1):
        batch = len(images)
        logits, (hidden, cell) = decoder.step(token, (hidden, cell))
        fees = None
        if penalty is not None:
            fees = penalty[images, length].repeat_interleave(beams, 0)
        best, tokens = _best_tokens(logits, length, beams + 1, config, fees)  # (B * K, K + 1)
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
            for image, *found in zip(
                images[done].tolist(),
                pool_words[done].tolist(),
                pool_total[done].tolist(),
                pool[done].tolist(),
                strict=True,
            ):
                results[image] = _hypotheses(*found)
            going = ~done
            images, live, words = images[going], live[going], words[going]
            pool, pool_total, pool_words = pool[going], pool_total[going], pool_words[going]
            token, chosen = token[going], chosen[going]
            if not len(images):
                break
        token, chosen = token.flatten(), chosen.flatten()
        hidden, cell = hidden.index_select(0, chosen), cell.index_select(0, chosen)
    if penalty is None:
        return results
    fees = penalty.cpu()
    return [_unpenalised(group, own, config) for group, own in zip(results, fees, strict=True)]


def _unpenalised(
    group: Sequence[Hypothesis], penalty: Tensor, config: SearchConfig
) -> list[Hypothesis]:
    """Give hypotheses back what they have paid of a penalty (max_length + 1, V); best first."""
    free = []
    for hypothesis in group:
        words = hypothesis.tokens
        paid = float(penalty[range(len(words) + 1), [*words, END_ID]].sum())
        total = hypothesis.log_probability + paid
        free.append(Hypothesis(words, total, total / (len(words) + 1) ** config.length_penalty))
    return sorted(free, key=lambda hypothesis: hypothesis.score, reverse=True)


@torch.inference_mode()
def sample(
    decoder: CaptionDecoder,
    features: Tensor,
    count: int,
    config: SearchConfig,
    chance: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Draw ``count`` captions for each of features (B, 2048) from the model's distribution.

    Args:
        decoder: on the device of ``features``.
        features: of the images.
        count: captions an image.
        config: the lengths, the temperature and top-p.
        chance: random numbers from 0 to 1, (B, count, max_length + 1); by default torch's own
            (``torch.manual_seed``).

    Returns:
        For each image its captions as they were drawn, not sorted; some may be the same.
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
        luck = (
            torch.rand(rows, 1, device=device)
            if chance is None
            else chance[:, :, length].reshape(rows, 1)
        )
        drawn = _draw(_forbid(logits, length, config), luck, config)
        total += log_probabilities.gather(1, drawn)[:, 0].masked_fill(finished, 0.0)
        token = drawn[:, 0].masked_fill(finished, PAD_ID)
        steps.append(token)
        finished |= token == END_ID
        if bool(finished.all()):
            break
    hypotheses = _ended(steps, total, config)
    return [hypotheses[start : start + count] for start in range(0, rows, count)]


def _draw(logits: Tensor, luck: Tensor, config: SearchConfig) -> Tensor:
    """Draw a token for each row of logits (R, V) by its random number (R, 1): (R, 1)."""
    if config.temperature != 1:
        logits = logits / config.temperature
    probabilities = logits.softmax(dim=-1)
    order = None
    if config.top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
    sums = probabilities.cumsum(dim=-1)
    last = sums[:, -1:]
    if order is not None:  # of the sums the first that reaches top_p is the last that counts
        reached = (sums < config.top_p * last).sum(dim=-1, keepdim=True)
        last = sums.gather(1, reached.clamp_(max=sums.shape[1] - 1))
    # Where the running sum of probabilities passes a random share of it: a number a row.
    drawn = torch.searchsorted(sums, luck * last, right=True).clamp_(max=sums.shape[1] - 1)
    return drawn if order is None else order.gather(1, drawn)


@torch.inference_mode()
def token_log_probabilities(
    decoder: CaptionDecoder, features: Tensor, captions: Sequence[Sequence[Sequence[int]]]
) -> list[list[list[float]]]:
    """Give the log-probability, in nats, of every token of captions given those before it.

    Args:
        decoder: on the device of ``features``.
        features: (B, 2048).
        captions: for each image its captions as word ids, without <start> and <end>.

    Returns:
        For each caption a number a word, and a last one for its <end>.
    """
    device = features.device
    rows = [[*caption, END_ID] for group in captions for caption in group]
    if not rows:
        return [[] for _ in captions]
    counts = torch.tensor([len(group) for group in captions], device=device)
    hidden, cell = (part.repeat_interleave(counts, 0) for part in decoder.start(features))
    longest = max(map(len, rows))
    padded = [row + [PAD_ID] * (longest - len(row)) for row in rows]
    targets = torch.tensor(padded, device=device)  # (R, T)
    token = torch.full((len(rows),), START_ID, device=device)
    found = []
    for place in range(longest):
        logits, (hidden, cell) = decoder.step(token, (hidden, cell))
        token = targets[:, place]
        found.append(logits.log_softmax(dim=-1).gather(1, token.unsqueeze(1)))
    each = iter(torch.cat(found, dim=1).tolist())
    return [[next(each)[: len(caption) + 1] for caption in group] for group in captions]


def _ended(steps: list[Tensor], totals: Tensor, config: SearchConfig) -> list[Hypothesis]:
    """Make hypotheses of the tokens (R,) of every step; each row has an <end>."""
    hypotheses = []
    for row, total in zip(torch.stack(steps, 1).tolist(), totals.tolist(), strict=True):
        words = row[: row.index(END_ID)]
        score = total / (len(words) + 1) ** config.length_penalty
        hypotheses.append(Hypothesis(words, total, score))
    return hypotheses


def _gather(sequences: Tensor, which: Tensor) -> Tensor:
    """Choose sequences of each image: (B, N, T) by (B, M) gives (B, M, T)."""
    return sequences.gather(1, which.unsqueeze(2).expand(-1, -1, sequences.shape[2]))


def _hypotheses(
    words: list[list[int]], totals: list[float], scores: list[float]
) -> list[Hypothesis]:
    """Make hypotheses of one image's pool, which is in the order of the scores."""
    return [
        Hypothesis(row[: row.index(END_ID)], total, score)
        for row, total, score in zip(words, totals, scores, strict=True)
        if score > -torch.inf
    ]
