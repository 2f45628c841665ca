"""CIDEr-D of one caption against others (Vedantam et al. 2015), as the COCO code computes it.

The clipped cosine similarity of TF-IDF vectors over n-grams of 1 to 4 tokens, with a penalty on
length differences. Tokens may be words or ids.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

LONGEST_NGRAM = 4
SIGMA = 6.0  # of the penalty on length differences, in words

Ngram = tuple[Hashable, ...]


def ngrams(tokens: Sequence[Hashable]) -> Counter[Ngram]:
    """Return how often each n-gram occurs, for n = 1 to 4."""
    words = tuple(tokens)
    return Counter(
        words[start : start + n]
        for n in range(1, LONGEST_NGRAM + 1)
        for start in range(len(words) - n + 1)
    )


@dataclass(frozen=True)
class TfIdf:
    """The TF-IDF vector of a caption.

    Attributes:
        weights: TF-IDF weight of each n-gram.
        norms: the vector's norm for n = 1 to 4.
        bigrams: number of bigrams, the COCO code's measure of length; it differs from
            words - 1 only for a caption without words.
    """

    weights: dict[Ngram, float]
    norms: list[float]
    bigrams: int


class Idf:
    """Inverse document frequency of n-grams; a document is the captions of one image.

    ``images`` holds, for each image, the n-grams that occur in at least one of its captions.
    """

    def __init__(self, images: Iterable[Iterable[Ngram]]) -> None:
        frequencies: Counter[Ngram] = Counter()
        count = 0
        for found in images:
            frequencies.update(found)
            count += 1
        # An unseen n-gram has the IDF of one that occurs in a single image.
        self._max_idf = math.log(count) if count else 0.0
        self._idf = {
            ngram: self._max_idf - math.log(frequency) for ngram, frequency in frequencies.items()
        }

    def tf_idf(self, counts: Mapping[Ngram, int]) -> TfIdf:
        """Return the TF-IDF vector of one caption's n-gram counts."""
        weights = {}
        squares = [0.0] * LONGEST_NGRAM
        words = 0
        for ngram, count in counts.items():
            weights[ngram] = weight = count * self._idf.get(ngram, self._max_idf)
            squares[len(ngram) - 1] += weight * weight
            words += count if len(ngram) == 1 else 0
        return TfIdf(weights, [math.sqrt(square) for square in squares], max(0, words - 1))


def cider_d(caption: TfIdf, references: Sequence[TfIdf]) -> float:
    """Return CIDEr-D of a caption: its mean over the references, in percent.

    As in the paper it is multiplied by 10, so that the maximum is 1000.
    """
    total = 0.0
    for reference in references:
        products = [0.0] * LONGEST_NGRAM
        others = reference.weights
        for ngram, weight in caption.weights.items():
            other = others.get(ngram)
            if other is not None:
                products[len(ngram) - 1] += min(weight, other) * other
        similarity = sum(
            product / (norm * other_norm)
            for product, norm, other_norm in zip(
                products, caption.norms, reference.norms, strict=True
            )
            if norm and other_norm
        )
        difference = caption.bigrams - reference.bigrams
        total += similarity * math.exp(-(difference**2) / (2 * SIGMA**2))
    return 100 * 10 * total / LONGEST_NGRAM / len(references)
