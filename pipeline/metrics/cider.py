"""CIDEr-D of one caption against others (Vedantam et al. 2015), as the COCO code computes it.

The cosine of TF-IDF vectors over n-grams of 1 to 4 tokens, clipped, with a penalty on a
difference in length. The scorer, the reward of self-critical training and the choice among
candidates all use it; tokens may be words or a vocabulary's numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

LONGEST_NGRAM = 4
SIGMA = 6.0  # in words, of the penalty on a difference in length

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
class Weighed:
    """A caption as CIDEr-D sees it.

    Attributes:
        weights: TF-IDF weight of each n-gram.
        norms: the vector's norm for n = 1 to 4.
        bigrams: how many there are: the COCO code measures length so, which differs from words
            only where a caption has no word at all.
    """

    weights: dict[Ngram, float]
    norms: list[float]
    bigrams: int


class Idf:
    """How rare n-grams are among the captions of a set of images.

    ``images`` gives for every image the n-grams that are in at least one of its captions.
    """

    def __init__(self, images: Iterable[Iterable[Ngram]]) -> None:
        frequencies: Counter[Ngram] = Counter()
        count = 0
        for found in images:
            frequencies.update(found)
            count += 1
        # An n-gram that no image has counts as if one had it.
        self._rarest = math.log(count) if count else 0.0
        self._rarity = {
            ngram: self._rarest - math.log(frequency) for ngram, frequency in frequencies.items()
        }

    def weigh(self, counts: Mapping[Ngram, int]) -> Weighed:
        """Weigh the n-grams of one caption."""
        weights = {}
        squares = [0.0] * LONGEST_NGRAM
        words = 0
        for ngram, count in counts.items():
            weights[ngram] = weight = count * self._rarity.get(ngram, self._rarest)
            squares[len(ngram) - 1] += weight * weight
            words += count if len(ngram) == 1 else 0
        return Weighed(weights, [math.sqrt(square) for square in squares], max(0, words - 1))


def cider_d(caption: Weighed, references: Sequence[Weighed]) -> float:
    """Return CIDEr-D of a caption: its mean over the references, in percent.

    As in the paper it is multiplied by 10, so that 1000 is the most that there is.
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
