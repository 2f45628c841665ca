"""Reranking of the captions that a search found.

A caption's score is its length-normalised log-probability, plus a weight times its agreement with
the n-grams predicted for the image (``consensus``), plus a weight times its image-text matching
score (``models.matcher``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.decoding.consensus import rank_by_consensus
from pipeline.decoding.hypothesis import Hypothesis, add_scores, best_first
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.search import beam_search, search
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.ensemble import CaptionDecoder
from pipeline.models.matcher import Matcher
from pipeline.models.ngram_predictor import NgramPredictor

# Beam size and Hamming penalty of the passes after the first; tuned on Flickr8k val together with
# the weights in ``options``.
LATER_BEAM, PASSES_DIVERSITY = 5, 1.0


@dataclass(frozen=True)
class Reranker:
    """A model's rerankers; each may be missing.

    Attributes:
        predictor: predicts the n-grams of an image's captions, for consensus.
        matcher: scores how well a caption fits an image.
    """

    predictor: NgramPredictor | None = None
    matcher: Matcher | None = None

    def to(self, device: torch.device) -> Reranker:
        """Return the rerankers with the matcher on ``device``; consensus runs on the CPU."""
        return replace(self, matcher=self.matcher.to(device) if self.matcher else None)

    def rank(
        self,
        decoder: CaptionDecoder,
        features: Tensor,
        found: list[list[Hypothesis]],
        config: SearchConfig,
    ) -> list[list[Hypothesis]]:
        """Rank the hypotheses of each row of features (B, 2048) by decoder and rerankers."""
        if self.matcher is not None and config.matching:
            cosines = self.matcher.fit(features, [[h.tokens for h in group] for group in found])
            found = [
                add_scores(group, [config.matching * v for v in values.tolist()], "matching")
                for group, values in zip(found, cosines, strict=True)
            ]
        if self.predictor is not None and config.consensus:
            with torch.inference_mode():
                images = decoder.embed_image(features)[0][:, 0]
            found = rank_by_consensus(self.predictor, images, found, config.consensus)
        return found


def best_captions(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
    keys: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Search for captions of features (B, 2048), and rank them with the weights of ``config``.

    With several passes, later, diverse searches add to the captions of the first: captions of one
    beam differ only in a word or two, and rerankers need more choice. ``keys``: see ``search``.
    """
    found = search(decoder, features, config, keys)
    ranked = reranker.rank(decoder, features, found, config)
    if config.search_passes == 1:
        return ranked
    later = _later_passes(decoder, features, config, reranker, ranked, PASSES_DIVERSITY)
    for searched, _ in itertools.islice(later, config.search_passes - 1):
        for group, more in zip(found, searched, strict=True):
            group += _others(more, group)
    return reranker.rank(decoder, features, [best_first(group) for group in found], config)


def diverse_captions(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
) -> list[list[Hypothesis]]:
    """Find ``config.num_captions`` different captions for each row of features (B, 2048).

    The first caption is that of ``best_captions``; the others are the best of each later pass,
    sorted by score. There are fewer if no more can be found.
    """
    best = best_captions(decoder, features, config, reranker)
    found = [group[:1] for group in best]
    later = _later_passes(decoder, features, config, reranker, best, config.diversity)
    for _, ranked in itertools.islice(later, config.num_captions - 1):
        for group, more in zip(found, ranked, strict=True):
            group += _others(more, group)[:1]
    return [[first, *best_first(others)] for first, *others in found]


def _others(hypotheses: list[Hypothesis], known: list[Hypothesis]) -> list[Hypothesis]:
    """Return the hypotheses whose tokens differ from those of every known one."""
    tokens = [hypothesis.tokens for hypothesis in known]
    return [hypothesis for hypothesis in hypotheses if hypothesis.tokens not in tokens]


def _later_passes(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
    ranked: list[list[Hypothesis]],
    diversity: float,
) -> Iterator[tuple[list[list[Hypothesis]], list[list[Hypothesis]]]]:
    """Search repeatedly, each time for captions unlike the best of earlier passes.

    A token is penalised by ``diversity`` for each earlier pass whose best caption has it at the
    same position: diverse beam search (Vijayakumar et al., arXiv 1610.02424, Hamming distance), one
    group after the other. ``ranked`` are the captions of the first pass.

    Yields:
        For each pass, its hypotheses with the decoder's own scores, and the same ones reranked.
    """
    config = replace(config, beam_size=min(config.beam_size, LATER_BEAM))
    size = len(features), config.max_length + 1, decoder.config.vocabulary_size
    penalty = torch.zeros(size, device=features.device)
    while True:
        for image, group in enumerate(ranked):
            words = group[0].tokens
            penalty[image, range(len(words)), words] += diversity
        searched = beam_search(decoder, features, config, penalty)
        ranked = reranker.rank(decoder, features, searched, config)
        yield searched, ranked


def reranker_of(checkpoint: Checkpoint) -> Reranker:
    """Build a checkpoint's rerankers on the CPU."""
    return Reranker(checkpoint.predictor, checkpoint.matcher)
