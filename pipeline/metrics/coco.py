"""Caption metrics in Python: BLEU, ROUGE-L and CIDEr-D (METEOR, SPICE: ``java``).

>>> scorer = Scorer({"a.jpg": [["a", "dog", "runs"]], "b.jpg": [["a", "red", "car"]]})
>>> scores = scorer.score({"a.jpg": ["a", "dog", "runs"], "b.jpg": ["a", "blue", "car"]})
>>> {name: round(value, 1) for name, value in scores.items()}
{'BLEU-1': 83.3, 'BLEU-2': 64.5, 'BLEU-3': 59.3, 'BLEU-4': 2.1, 'ROUGE-L': 83.3, 'CIDEr-D': 437.5}

All scores are in percent. The definitions are those of the COCO code (pycocoevalcap), whose
``Cider`` class is CIDEr-D. A special token that reached a scorer would change the scores: an end
token left in both references and predictions raises BLEU-4 and ROUGE-L by several points.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from pipeline.datasets.vocabulary import END, PAD, START, UNKNOWN
from pipeline.metrics.cider import LONGEST_NGRAM, Idf, Ngram, cider_d, ngrams
from pipeline.utils.errors import UserError

References = Mapping[str, Sequence[Sequence[str]]]  # image name -> tokens of each reference
Predictions = Mapping[str, Sequence[str]]  # image name -> tokens

ROUGE_BETA = 1.2  # weight of recall relative to precision


class Scorer:
    """Scores predictions against the references of the same images, one or more per image.

    Raises:
        UserError: there is no image, or an image has no references.
        ValueError: a special token is among the tokens.
    """

    def __init__(self, references: References) -> None:
        check_references(references)
        self._references = {
            name: [_Reference(tokens) for tokens in captions]
            for name, captions in references.items()
        }
        self._idf = Idf(
            {ngram for caption in captions for ngram in caption.counts}
            for captions in self._references.values()
        )
        self._reference_vectors = {
            name: [self._idf.tf_idf(caption.counts) for caption in captions]
            for name, captions in self._references.items()
        }
        self._most: dict[str, Counter[Ngram]] = {}  # highest count in one reference
        for name, captions in self._references.items():
            self._most[name] = Counter()
            for caption in captions:
                self._most[name] |= caption.counts

    def score(self, predictions: Predictions) -> dict[str, float]:
        """Return BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of the predictions, in percent.

        Raises:
            UserError: the images are not those of the references.
            ValueError: a special token is among the tokens.
        """
        counts = self._count(predictions)
        rows = self._bleu_counts(predictions, counts).values()
        totals = [sum(column) for column in zip(*rows, strict=True)]
        scores = {f"BLEU-{n + 1}": value for n, value in enumerate(bleu_of_counts(totals))}
        scores["ROUGE-L"] = self._rouge(predictions)
        cider = self._cider(counts)
        scores["CIDEr-D"] = math.fsum(cider.values()) / len(cider)
        return scores

    def per_image_bleu_counts(self, predictions: Predictions) -> dict[str, list[int]]:
        """Return for each image the counts that BLEU pools: see ``bleu_of_counts``."""
        return self._bleu_counts(predictions, self._count(predictions))

    def per_image_cider(self, predictions: Predictions) -> dict[str, float]:
        """Return the CIDEr-D of each image in percent; their mean is the corpus's score.

        Document frequencies are those of the references, so with one image the score is 0.
        """
        return self._cider(self._count(predictions))

    def _count(self, predictions: Predictions) -> dict[str, Counter[Ngram]]:
        """Return the n-grams of each prediction, in the references' order of images."""
        check_predictions(predictions, self._references)
        return {name: ngrams(predictions[name]) for name in self._references}

    def _bleu_counts(
        self, predictions: Predictions, counts: Mapping[str, Counter[Ngram]]
    ) -> dict[str, list[int]]:
        rows = {}
        for name, found in counts.items():
            length = len(predictions[name])
            # The length closest to the prediction's; the shorter of two equally close.
            reference_length = min(
                (abs(caption.length - length), caption.length) for caption in self._references[name]
            )[1]
            matched = [0] * LONGEST_NGRAM
            most = self._most[name]
            for ngram, count in found.items():
                matched[len(ngram) - 1] += min(count, most[ngram])
            proposed = [max(0, length - n) for n in range(LONGEST_NGRAM)]
            rows[name] = [*matched, *proposed, length, reference_length]
        return rows

    def _rouge(self, predictions: Predictions) -> float:
        """Return the mean ROUGE-L of the images (Lin 2004), in percent.

        As in the COCO code, precision and recall are each the best over the references.
        """
        total = 0.0
        for name, captions in self._references.items():
            tokens = predictions[name]
            common = [caption.longest_common_subsequence(tokens) for caption in captions]
            if not any(common):
                continue
            precision = max(common) / len(tokens)
            recall = max(
                length / caption.length
                for length, caption in zip(common, captions, strict=True)
                if length
            )
            beta_squared = ROUGE_BETA**2
            total += (1 + beta_squared) * precision * recall / (recall + beta_squared * precision)
        return 100 * total / len(self._references)

    def _cider(self, counts: Mapping[str, Counter[Ngram]]) -> dict[str, float]:
        return {
            name: cider_d(self._idf.tf_idf(found), self._reference_vectors[name])
            for name, found in counts.items()
        }


class _Reference:
    """One reference, prepared for all three scores."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.length = len(tokens)
        self.counts = ngrams(tokens)
        self._positions: dict[str, int] = {}  # token -> bitmask of its positions
        for place, token in enumerate(tokens):
            self._positions[token] = self._positions.get(token, 0) | 1 << place

    def longest_common_subsequence(self, tokens: Sequence[str]) -> int:
        """Return the length of the longest common subsequence with ``tokens``.

        Bit-parallel (Hyyrö 2004): a row of the usual DP table is one integer, in which a
        zero marks each position where the length grows by one.
        """
        full = (1 << self.length) - 1
        row = full
        for token in tokens:
            matches = row & self._positions.get(token, 0)
            row = ((row + matches) | (row - matches)) & full
        return self.length - row.bit_count()


def bleu_of_counts(totals: Sequence[float]) -> list[float]:
    """Return corpus BLEU-1 to BLEU-4 (Papineni et al. 2002) of pooled counts, in percent.

    ``totals`` holds the numbers of matched n-grams (n = 1 to 4), proposed n-grams (n = 1 to 4),
    words in the predictions and words in the references.
    """
    matched, proposed = totals[:LONGEST_NGRAM], totals[LONGEST_NGRAM : 2 * LONGEST_NGRAM]
    predicted_length, reference_length = totals[2 * LONGEST_NGRAM :]
    # The COCO code's constants, which keep the divisions defined.
    tiny, small = 1e-15, 1e-9
    ratio = (predicted_length + tiny) / (reference_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores = []
    product = 1.0
    for n in range(LONGEST_NGRAM):
        product *= (matched[n] + tiny) / (proposed[n] + small)
        scores.append(100 * brevity * product ** (1 / (n + 1)))
    return scores


def check_references(references: References) -> None:
    """Raise UserError or ValueError if the references cannot be scored against."""
    if not references:
        raise UserError("there are no references to score against")
    without = [name for name, captions in references.items() if not captions]
    if without:
        raise UserError(f"{_images(without)} without a reference caption")
    # References never pass through the vocabulary, so <unk> is an error in them too.
    for name, captions in references.items():
        for tokens in captions:
            _check_tokens(name, tokens, forbidden={PAD, START, END, UNKNOWN})


def check_predictions(predictions: Predictions, references: Mapping[str, object]) -> None:
    """Raise UserError or ValueError if the predictions do not fit the references."""
    missing = [name for name in references if name not in predictions]
    if missing:
        raise UserError(f"{_images(missing)} with references but without a prediction")
    unexpected = [name for name in predictions if name not in references]
    if unexpected:
        raise UserError(f"{_images(unexpected)} with a prediction but without references")
    for name, tokens in predictions.items():
        _check_tokens(name, tokens, forbidden={PAD, START, END})


def _images(names: Sequence[str]) -> str:
    """Return "2 images (such as 'a.jpg')"."""
    if len(names) == 1:
        return f"1 image ({names[0]!r})"
    return f"{len(names)} images (such as {names[0]!r})"


def _check_tokens(name: str, tokens: Sequence[str], forbidden: set[str]) -> None:
    """Raise ValueError for a special token or untokenised text."""
    if isinstance(tokens, str):
        raise ValueError(f"{name}: a caption to score is a list of tokens, not a string")
    found = forbidden.intersection(tokens)
    if found:
        raise ValueError(f"{name}: the special token {min(found)} must not reach a scorer")


def diversity(
    predictions: Predictions, train_captions: Iterable[Sequence[str]]
) -> dict[str, float | int]:
    """Return how varied the predictions are, and how many of them are training captions.

    A training caption is no fault in itself (Vinyals et al. 2015 found 80 percent), but a lack of
    variety is.
    """
    captions = [tuple(tokens) for tokens in predictions.values()]
    known = {tuple(tokens) for tokens in train_captions}
    copied = sum(caption in known for caption in captions)
    images = max(1, len(captions))
    return {
        "distinct_captions": len(set(captions)),
        "distinct_words": len(set(chain.from_iterable(captions))),
        "copied_from_train": copied,
        "copied_from_train_percent": 100 * copied / images,
        "mean_length": sum(map(len, captions)) / images,
    }
