"""The choice among the captions that a search found, by second opinions.

A caption's score is its log-probability, length-normalised; plus a weight times its agreement with
the captions of similar training images (``consensus``); plus a weight times how well it fits the
image (``matching``). On Flickr8k each adds to the other: the first prefers what people say of
such images, the second what tells this one from others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.decoding.consensus import Consensus
from pipeline.decoding.search import Hypothesis, SearchConfig, beam_search, search
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.ensemble import CaptionDecoder
from pipeline.models.matcher import Matcher
from pipeline.utils.errors import UserError

# How captions are searched where there are second opinions: more candidates than the decoder alone
# needs, and more yet of several decoders together, whose lower ranks are better; what an agreement
# of 1 (of 10), and a cosine of 1, weigh against a log-probability of 1.
RERANKED_BEAM, RERANKED_BEAM_TOGETHER = 10, 20
CONSENSUS_WEIGHT, MATCHING_WEIGHT = 2.0, 2.0
# Beams of the rounds after the first, and what a word costs there. Together with the weights that
# are best for them, for the choice among what several rounds found, chosen on Flickr8k's val.
LATER_BEAM, ROUNDS_DIVERSITY = 5, 1.0
ROUNDS_CONSENSUS, ROUNDS_MATCHING = 3.0, 4.0


@dataclass(frozen=True)
class Reranker:
    """A model's second opinions; each may be missing.

    Attributes:
        consensus: ranks captions by similar training images.
        matcher: tells how well a caption fits an image.
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
    rounds: int = 1,
    **others: Any,
) -> SearchConfig:
    """Choose how to search where not all is said: with every second opinion that there is.

    Args:
        reranker: the model's second opinions.
        beam_size: hypotheses an image, or None: with second opinions 10, or 20 of several
            decoders, without them 3; but ``least``.
        consensus, matching: weights of the second opinions; 0 is without, None the usual one.
        least: how many hypotheses are needed.
        decoders: how many caption together.
        sampling: draw captions: ``least`` of them, and without second opinions, where not said.
        rounds: how often to search, of which second opinions gain.
        others: see ``SearchConfig``.

    Raises:
        UserError: a second opinion is asked for that the model does not have.
    """
    if rounds > 1 and (sampling or beam_size == 1):
        raise UserError(f"--rounds {rounds}: is for beams, not for greedy search or drawn captions")
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
        usual = CONSENSUS_WEIGHT if rounds == 1 else ROUNDS_CONSENSUS
        consensus = usual if there else 0.0
    if matching is None:
        there = reranker.matcher is not None and not sampling
        usual = MATCHING_WEIGHT if rounds == 1 else ROUNDS_MATCHING
        matching = usual if there else 0.0
    if sampling:
        beam_size = beam_size or least
    if beam_size == 1:
        consensus = matching = 0.0  # there is nothing to choose from
    beams = SearchConfig.beam_size
    if consensus or matching:
        beams = RERANKED_BEAM if decoders == 1 or rounds > 1 else RERANKED_BEAM_TOGETHER
    return SearchConfig(
        beam_size=max(beams, least) if beam_size is None else beam_size,
        consensus=consensus,
        matching=matching,
        sampling=sampling,
        rounds=rounds,
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

    With several rounds, captions of later searches, each for something else, are added to those
    of the first: beams differ in a word or two, and second opinions want more to choose from.
    ``keys`` are those of ``search``.
    """
    found = search(decoder, features, config, keys)
    ranked = _ranked(decoder, features, found, config, reranker)
    if config.rounds == 1:
        return ranked
    later = _later_rounds(decoder, features, config, reranker, ranked, ROUNDS_DIVERSITY)
    for searched, _ in itertools.islice(later, config.rounds - 1):
        for group, more in zip(found, searched, strict=True):
            known = {tuple(hypothesis.tokens) for hypothesis in group}
            group += [h for h in more if tuple(h.tokens) not in known]
    for group in found:
        group.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
    return _ranked(decoder, features, found, config, reranker)


def diverse_captions(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
    count: int,
) -> list[list[Hypothesis]]:
    """Find ``count`` captions of each of features (B, 2048) that say different things.

    The first caption is that of ``best_captions``; each other one is the best of a later round,
    and they follow by their scores.

    Returns:
        For each image its captions; fewer than ``count`` where no other could be found.
    """
    best = best_captions(decoder, features, config, reranker)
    found = [group[:1] for group in best]
    later = _later_rounds(decoder, features, config, reranker, best, config.diversity)
    for _, ranked in itertools.islice(later, count - 1):
        for group, more in zip(found, ranked, strict=True):
            known = {tuple(hypothesis.tokens) for hypothesis in group}
            group += [h for h in more if tuple(h.tokens) not in known][:1]
    return [
        [first, *sorted(others, key=lambda hypothesis: hypothesis.score, reverse=True)]
        for first, *others in found
    ]


def _later_rounds(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
    ranked: list[list[Hypothesis]],
    diversity: float,
) -> Iterator[tuple[list[list[Hypothesis]], list[list[Hypothesis]]]]:
    """Search on and on, each time for something else.

    A word costs ``diversity`` for each earlier round whose best caption has it in the same place
    (Vijayakumar et al., arXiv 1610.02424, with the Hamming distance; their groups of beams grow
    side by side). ``ranked`` are the captions of the first round.

    Yields:
        The hypotheses of a round, with scores of the decoder alone; and the same ranked.
    """
    config = replace(config, beam_size=min(config.beam_size, LATER_BEAM))
    size = len(features), config.max_length + 1, decoder.config.vocabulary_size
    penalty = torch.zeros(size, device=features.device)
    while True:
        for image, group in enumerate(ranked):
            words = group[0].tokens
            penalty[image, range(len(words)), words] += diversity
        searched = beam_search(decoder, features, config, penalty)
        ranked = _ranked(decoder, features, searched, config, reranker)
        yield searched, ranked


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


def reranker_of(checkpoint: Checkpoint) -> Reranker:
    """Build the rerankers that a checkpoint has, on the CPU."""
    neighbours = checkpoint.neighbours
    return Reranker(Consensus(neighbours) if neighbours is not None else None, checkpoint.matcher)
