"""Sampling captions from the model's distribution, with temperature and top-p."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.decoding.hypothesis import Hypothesis, best_first, forbid_tokens, generate
from pipeline.decoding.options import SearchConfig
from pipeline.models.ensemble import CaptionDecoder


def draw_captions(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig, keys: Sequence[int]
) -> list[list[Hypothesis]]:
    """Draw ``beam_size`` captions for each row of features (B, 2048); see ``search.search``.

    Returns:
        For each image, its distinct captions, best first.
    """
    size = config.beam_size, config.max_length + 1
    uniform = torch.stack([_uniform(config.seed, key, size) for key in keys])
    drawn = sample(decoder, features, config.beam_size, config, uniform.to(features.device))
    return [best_first({tuple(h.tokens): h for h in group}.values()) for group in drawn]


def _uniform(seed: int, key: int, size: tuple[int, ...]) -> Tensor:
    """Return random numbers from 0 to 1 that depend only on ``seed`` and ``key``."""
    # torch takes only 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    return torch.rand(size, generator=generator)


@torch.inference_mode()
def sample(
    decoder: CaptionDecoder,
    features: Tensor,
    count: int,
    config: SearchConfig,
    uniform: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Draw ``count`` captions for each row of features (B, 2048) from the model's distribution.

    ``uniform`` are random numbers from 0 to 1, (B, count, max_length + 1); by default from torch's
    global generator (``torch.manual_seed``).

    Returns:
        For each image, its captions in the order drawn; there may be duplicates.
    """
    hidden, cell = decoder.start(features)
    state = hidden.repeat_interleave(count, 0), cell.repeat_interleave(count, 0)
    rows = len(state[0])

    def draw(logits: Tensor, length: int) -> tuple[Tensor, Tensor]:
        log_probabilities = logits.log_softmax(dim=-1)
        if uniform is None:
            now = torch.rand(rows, 1, device=features.device)
        else:
            now = uniform[:, :, length].reshape(rows, 1)
        drawn = _draw(forbid_tokens(logits, length, config), now, config)
        return log_probabilities.gather(1, drawn), drawn

    hypotheses = generate(decoder, state, config, draw)
    return [hypotheses[start : start + count] for start in range(0, rows, count)]


def _draw(logits: Tensor, uniform: Tensor, config: SearchConfig) -> Tensor:
    """Draw tokens (R, 1), one per row of logits (R, V), by random numbers (R, 1)."""
    if config.temperature != 1:
        logits = logits / config.temperature
    probabilities = logits.softmax(dim=-1)
    order = None
    if config.top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
    sums = probabilities.cumsum(dim=-1)
    last = sums[:, -1:]
    if order is not None:  # cut off after the first sum that reaches top_p
        reached = (sums < config.top_p * last).sum(dim=-1, keepdim=True)
        last = sums.gather(1, reached.clamp_(max=sums.shape[1] - 1))
    # The first token whose cumulative probability exceeds a random fraction of the last sum.
    drawn = torch.searchsorted(sums, uniform * last, right=True).clamp_(max=sums.shape[1] - 1)
    return drawn if order is None else order.gather(1, drawn)
