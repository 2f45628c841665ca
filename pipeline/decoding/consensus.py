"""Consensus reranking: favour captions that agree with the n-grams predicted for the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from torch import Tensor

from pipeline.datasets.vocabulary import END_ID
from pipeline.decoding.hypothesis import Hypothesis, add_scores
from pipeline.metrics.cider import LONGEST_NGRAM
from pipeline.models.ngram_predictor import NgramPredictor, count_ngrams, orders_of, vector_norms


def rank_by_consensus(
    predictor: NgramPredictor,
    images: Tensor,
    found: Sequence[Sequence[Hypothesis]],
    weight: float,
) -> list[list[Hypothesis]]:
    """Add each hypothesis's weighted agreement to its score; return the hypotheses best first.

    The agreement is CIDEr-D (0 to 10) between a hypothesis and the vectors predicted for its image,
    without CIDEr-D's count clipping and length penalty.

    Args:
        predictor: see ``NgramPredictor``.
        images: image embeddings, (B, M * E).
        found: the hypotheses of each image.
        weight: factor of the agreement.
    """
    captions = [[*h.tokens, END_ID] for group in found for h in group]
    image = numpy.repeat(numpy.arange(len(found)), [len(group) for group in found])
    lengths = numpy.array([len(caption) for caption in captions])
    tokens = numpy.array([token for caption in captions for token in caption], numpy.int32)
    keys, owners, counts = count_ngrams(tokens, lengths)
    known = predictor.keys.numpy().view(numpy.uint64)
    positions = numpy.searchsorted(known, keys).clip(max=len(known) - 1)
    missing = known[positions] != keys
    idf = predictor.idf.numpy()[numpy.where(missing, len(known), positions)]
    orders = orders_of(keys)
    norms = vector_norms(counts * idf, orders, owners, len(captions))
    predicted = predictor.predict(images).numpy()[image[owners], positions]
    predicted[missing] = 0
    values = predicted * idf / norms[owners, orders]
    agreement = numpy.bincount(owners, values, minlength=len(captions)) * 10 / LONGEST_NGRAM
    added = iter((weight * agreement).tolist())
    return [add_scores(group, [next(added) for _ in group], "consensus") for group in found]
