"""The choice among the captions that a search found, by second opinions.

A caption's score is its log-probability, length-normalised; plus a weight times its agreement with
the captions of similar training pictures (``consensus``); plus a weight times how well it fits the
picture (``matching``). On Flickr8k each adds to the other: the first prefers what people say of
such pictures, the second what tells this one from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.consensus import Consensus
from pipeline.ensemble import CaptionDecoder
from pipeline.errors import UserError
from pipeline.matching import Matcher
from pipeline.search import (
    Hypothesis,
    SearchConfig,
    beam_search,
    search,
    token_log_probabilities,
)

# How captions are searched where there are second opinions: more candidates than the decoder alone
# needs, and more yet of several decoders together, whose lower ranks are better; what an agreement
# of 1 (of 10), and a cosine of 1, weigh against a log-probability of 1.
RERANKED_BEAM, RERANKED_BEAM_TOGETHER = 10, 20
CONSENSUS_WEIGHT, MATCHING_WEIGHT = 2.0, 2.0
# Where captions are to differ, each after the first is the best of so many.
DIVERSE_BEAM = 5


@dataclass(frozen=True)
class Reranker:
    """A model's second opinions; each may be missing.

    Attributes:
        consensus: ranks captions by similar training pictures.
        matcher: tells how well a caption fits a picture.
    """

    consensus: Consensus | None = None
    matcher: Matcher | None = None

    def to(self, device: torch.device) -> Reranker:
        """Move to the decoder's device what computes there."""
        return replace(self, matcher=self.matcher.to(device) if self.matcher else None)


def search_config(
    reranker: Reranker,
    beam_size: int | None = None,
    consensus: float | None = None,
    matching: float | None = None,
    least: int = 1,
    decoders: int = 1,
    sampling: bool = False,
    **others: Any,
) -> SearchConfig:
    """Choose how to search where not all is said: with every second opinion that there is.

    Args:
        reranker: the model's second opinions.
        beam_size: hypotheses a picture, or None: with second opinions 10, or 20 of several
            decoders, without them 3; but ``least``.
        consensus, matching: weights of the second opinions; 0 is without, None the usual one.
        least: how many hypotheses are needed.
        decoders: how many caption together.
        sampling: draw captions: ``least`` of them, and without second opinions, where not said.
        others: see ``SearchConfig``.

    Raises:
        UserError: a second opinion is asked for that the model does not have.
    """
    for option, weight, there in (
        ("--consensus", consensus, reranker.consensus is not None),
        ("--matching", matching, reranker.matcher is not None),
    ):
        if weight and not there:
            raise UserError(
                f"{option} {weight:g}: this model has not what it takes; train it with this "
                f"version, or use {option} 0"
            )
    if consensus is None:
        there = reranker.consensus is not None and not sampling
        consensus = CONSENSUS_WEIGHT if there else 0.0
    if matching is None:
        there = reranker.matcher is not None and not sampling
        matching = MATCHING_WEIGHT if there else 0.0
    if sampling:
        beam_size = beam_size or least
    if beam_size == 1:
        consensus = matching = 0.0  # there is nothing to choose from
    usual = SearchConfig.beam_size
    if consensus or matching:
        usual = RERANKED_BEAM if decoders == 1 else RERANKED_BEAM_TOGETHER
    return SearchConfig(
        beam_size=max(usual, least) if beam_size is None else beam_size,
        consensus=consensus,
        matching=matching,
        sampling=sampling,
        **others,
    )


def best_captions(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
    keys: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Search captions for features (B, 2048), and rank them by what ``config`` gives a weight.

    ``keys`` are those of ``search``.
    """
    return _ranked(decoder, features, search(decoder, features, config, keys), config, reranker)


def diverse_captions(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
    count: int,
) -> list[list[Hypothesis]]:
    """Find ``count`` captions of each of features (B, 2048) that say different things.

    One search after the other: a word costs ``config.diversity`` for each caption that was found
    before and has it in the same place (Vijayakumar et al., arXiv 1610.02424, with the Hamming
    distance; their groups of beams grow side by side). The first caption is that of
    ``best_captions``; the others follow by their scores, which are without what words cost.

    Returns:
        For each picture its captions; fewer than ``count`` where no other could be found.
    """
    found = [group[:1] for group in best_captions(decoder, features, config, reranker)]
    later = replace(config, beam_size=min(config.beam_size, DIVERSE_BEAM))
    size = len(features), config.max_length + 1, decoder.config.vocabulary_size
    penalty = torch.zeros(size, device=features.device)
    for _ in range(count - 1):
        for picture, group in enumerate(found):
            words = group[-1].tokens
            penalty[picture, range(len(words)), words] += config.diversity
        searched = beam_search(decoder, features, later, penalty)
        chances = token_log_probabilities(
            decoder, features, [[h.tokens for h in group] for group in searched]
        )
        groups = [
            [
                Hypothesis(
                    h.tokens, sum(chance), sum(chance) / len(chance) ** config.length_penalty
                )
                for h, chance in zip(group, each, strict=True)
            ]
            for group, each in zip(searched, chances, strict=True)
        ]
        ranked = _ranked(decoder, features, groups, config, reranker)
        for group, more in zip(found, ranked, strict=True):
            known = {tuple(hypothesis.tokens) for hypothesis in group}
            group += [h for h in more if tuple(h.tokens) not in known][:1]
    return [
        [first, *sorted(others, key=lambda hypothesis: hypothesis.score, reverse=True)]
        for first, *others in found
    ]


def _ranked(
    decoder: CaptionDecoder,
    features: Tensor,
    found: list[list[Hypothesis]],
    config: SearchConfig,
    reranker: Reranker,
) -> list[list[Hypothesis]]:
    """Put the hypotheses of each of features (B, 2048) in the order of all opinions."""
    if reranker.matcher is not None and config.matching:
        cosines = reranker.matcher.fit(features, [[h.tokens for h in group] for group in found])
        found = [
            sorted(
                (
                    replace(hypothesis, score=hypothesis.score + config.matching * cosine)
                    for hypothesis, cosine in zip(group, values.tolist(), strict=True)
                ),
                key=lambda hypothesis: hypothesis.score,
                reverse=True,
            )
            for group, values in zip(found, cosines, strict=True)
        ]
    if reranker.consensus is not None and config.consensus:
        with torch.inference_mode():
            images = decoder.embed_image(features)[0][:, 0]
        found = reranker.consensus.rank(images, found, config.consensus)
    return found
