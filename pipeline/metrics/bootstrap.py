"""Uncertainty of scores: bootstrap intervals, and a paired test of two sets of predictions.

Both resample images, the sampling unit of a test set. CIDEr-D's document frequencies remain those
of all images, as they are part of the metric, not of the sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from pipeline.metrics.coco import Predictions, Scorer, bleu_of_counts

RESAMPLES = 2000
# Resampled sets scored at a time, to bound memory.
AT_ONCE = 200

Scores = dict[str, numpy.ndarray]  # name -> a score for each resampled set, (R,)


@dataclass(frozen=True)
class Interval:
    """A 95 % percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13), in percent."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How the second of two sets of predictions differs from the first.

    Attributes:
        first, second: the scores, in percent.
        interval: of ``second - first`` over resampled images.
        p_value: how often swapping the two captions of random images gives a difference at
            least as large: approximate randomization, two-sided (Riezler and Maxwell 2005).
    """

    first: float
    second: float
    interval: Interval
    p_value: float


class PerImage:
    """The per-image components of the scores of one set of predictions.

    Attributes:
        bleu: int64 (N, 10), see ``coco.bleu_of_counts``.
        cider: float64 (N,), in percent.
    """

    def __init__(self, scorer: Scorer, predictions: Predictions) -> None:
        counts = scorer.per_image_bleu_counts(predictions).values()
        self.bleu = numpy.array([*counts], dtype=numpy.int64)
        self.cider = numpy.array([*scorer.per_image_cider(predictions).values()])

    def scores(self, weights: numpy.ndarray) -> Scores:
        """Score sets in which image i occurs ``weights[:, i]`` times: (R, N) to (R,) per score."""
        return _scores(weights @ self.bleu, weights @ self.cider / weights.sum(1))


def _scores(bleu: numpy.ndarray, cider: numpy.ndarray) -> Scores:
    """Return BLEU-4 of pooled counts (R, 10), and CIDEr-D (R,)."""
    return {"BLEU-4": numpy.array([bleu_of_counts(row)[3] for row in bleu]), "CIDEr-D": cider}


def bootstrap(parts: PerImage, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Return the 95 % intervals of BLEU-4 and CIDEr-D over images."""
    [resampled] = _resampled([parts], seed, resamples)
    return {name: _interval(values) for name, values in resampled.items()}


def compare(
    first: PerImage, second: PerImage, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """Test whether two sets of predictions for the same images differ in BLEU-4 and CIDEr-D."""
    before, after = _resampled([first, second], seed, resamples)
    everything = numpy.ones((1, len(first.cider)), dtype=numpy.int64)
    scores = [parts.scores(everything) for parts in (first, second)]
    exchanged = _exchanged(first, second, seed, resamples)
    differences = {}
    for name in before:
        found = [float(score[name][0]) for score in scores]
        # Slightly below, so that the same set of captions counts despite rounding.
        as_large = numpy.abs(exchanged[name]) >= abs(found[1] - found[0]) - 1e-9
        differences[name] = Difference(
            found[0],
            found[1],
            _interval(after[name] - before[name]),
            (1 + int(as_large.sum())) / (1 + resamples),
        )
    return differences


def _interval(values: numpy.ndarray) -> Interval:
    low, high = numpy.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


def _chunks(resamples: int) -> Iterator[int]:
    """Yield how many resampled sets to score at a time."""
    for start in range(0, resamples, AT_ONCE):
        yield min(AT_ONCE, resamples - start)


def _resampled(sets: list[PerImage], seed: int, resamples: int) -> list[Scores]:
    """Score each of ``sets`` on the same images drawn with replacement, ``resamples`` times."""
    random = numpy.random.default_rng(seed)
    images = len(sets[0].cider)
    found: list[list[Scores]] = [[] for _ in sets]
    for count in _chunks(resamples):
        weights = random.multinomial(images, numpy.full(images, 1 / images), size=count)
        for results, parts in zip(found, sets, strict=True):
            results.append(parts.scores(weights))
    return [_join(results) for results in found]


def _exchanged(first: PerImage, second: PerImage, seed: int, resamples: int) -> Scores:
    """Return the score differences after swapping the captions of random images."""
    random = numpy.random.default_rng(seed)
    found = []
    for count in _chunks(resamples):
        stay = random.integers(0, 2, (count, len(first.cider)))
        go = 1 - stay
        before, after = (
            _scores(
                stay @ mine.bleu + go @ theirs.bleu,
                (stay @ mine.cider + go @ theirs.cider) / len(first.cider),
            )
            for mine, theirs in ((first, second), (second, first))
        )
        found.append({name: after[name] - before[name] for name in before})
    return _join(found)


def _join(results: list[Scores]) -> Scores:
    return {name: numpy.concatenate([r[name] for r in results]) for name in results[0]}
