"""Consensus: n-grams as CIDEr-D weights them, predicted from images, and the ranking by them."""

from __future__ import annotations

import math
import random
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions
from pipeline.datasets.vocabulary import END_ID, Vocabulary
from pipeline.decoding.consensus import rank_by_consensus
from pipeline.decoding.hypothesis import Hypothesis
from pipeline.metrics.cider import Idf, ngrams
from pipeline.models import ngram_predictor as module
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.ngram_predictor import (
    RIDGE,
    NgramPredictor,
    count_ngrams,
    fit_predictor,
    merge_predictors,
    ngram_targets,
    sampled_images,
)

WORDS = Vocabulary.build([[*"abcdefgh"]], min_count=1)
Ngram = tuple[Hashable, ...]


def made_up(images: int, seed: int = 0) -> tuple[list[list[list[int]]], EncodedCaptions]:
    """Return captions of few words, which repeat n-grams within a caption and across images."""
    lots = random.Random(seed)
    groups = [
        [lots.choices("abcdefgh", k=lots.randint(1, 12)) for _ in range(lots.randint(1, 5))]
        for _ in range(images)
    ]
    ids = [[[*WORDS.encode(caption), END_ID] for caption in group] for group in groups]
    return ids, encode_captions(groups, WORDS)


def unit_vector(rarity: Idf, caption: Sequence[int]) -> dict[Ngram, float]:
    """Return a caption's tf-idf of each n-gram, of length 1 for each n."""
    vector = rarity.tf_idf(ngrams(caption))
    return {g: w / (vector.norms[len(g) - 1] or 1.0) for g, w in vector.weights.items()}


def idf(rarity: Idf, gram: Ngram) -> float:
    return rarity.tf_idf({gram: 1}).weights[gram]


def key_of(gram: tuple[Hashable, ...]) -> int:
    tokens = numpy.array(gram, numpy.int32)
    keys, _, _ = count_ngrams(tokens, numpy.array([len(gram)]))
    [own] = keys[(keys & numpy.uint64(3)) == len(gram) - 1]
    return int(own.view(numpy.int64))


def rarity_of(groups: list[list[list[int]]]) -> Idf:
    return Idf({g for caption in group for g in ngrams(caption)} for group in groups)


@pytest.mark.parametrize("images", [2, 150])
def test_targets_are_the_mean_vectors_of_n_grams_that_images_share(images: int) -> None:
    groups, captions = made_up(images)
    targets, rarity = ngram_targets(captions), rarity_of(groups)
    fewest = min(10, 2 + images // 100)
    owners: dict[Ngram, set[int]] = defaultdict(set)
    for image, group in enumerate(groups):
        for caption in group:
            for gram in ngrams(caption):
                owners[gram].add(image)
    kept = {key_of(gram): gram for gram, having in owners.items() if len(having) >= fewest}
    assert set(targets.keys.tolist()) == set(kept)
    unsigned = targets.keys.numpy().view(numpy.uint64)
    assert (unsigned[1:] > unsigned[:-1]).all()
    vectors = targets.vectors.to_dense()
    for row, key in enumerate(targets.keys.tolist()):
        assert float(targets.idf[row]) == pytest.approx(idf(rarity, kept[key]), abs=1e-6)
    assert float(targets.idf[-1]) == pytest.approx(math.log(images))
    for image, group in enumerate(groups):
        each = [unit_vector(rarity, caption) for caption in group]
        for row, key in enumerate(targets.keys.tolist()):
            mean = sum(vector.get(kept[key], 0.0) for vector in each) / len(group)
            assert float(vectors[row, image]) == pytest.approx(mean, abs=1e-6)


def test_of_many_n_grams_the_most_frequent_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _, captions = made_up(150)
    whole = ngram_targets(captions)
    monkeypatch.setattr(module, "MOST_NGRAMS", 20)
    few = ngram_targets(captions)
    assert len(few.keys) == 20 and set(few.keys.tolist()) < set(whole.keys.tolist())
    assert sorted(few.idf[:-1].tolist()) == sorted(whole.idf[:-1].tolist())[:20]


def make_decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(DecoderConfig(len(WORDS), 6, 8, feature_size=3)).eval()


def embedded(decoder: Decoder, features: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder.embed_image(features)[0][:, 0]


def fitted(images: int = 80, seed: int = 0) -> tuple[Decoder, Tensor, NgramPredictor]:
    decoder, features = make_decoder(seed), torch.randn(images, 3)
    predictor = fit_predictor(decoder, features.split(32), ngram_targets(made_up(images)[1]))
    assert predictor is not None
    return decoder, embedded(decoder, features), predictor


def test_the_fit_is_the_ridge_regression() -> None:
    """The gradient of squared errors plus the ridge is 0 there."""
    _, images, predictor = fitted()
    vectors = ngram_targets(made_up(80)[1]).vectors.to_dense().T
    directions = torch.nn.functional.normalize(images - images.mean(0), dim=1)
    errors = directions @ predictor.weights + predictor.intercept - vectors
    gradient = directions.T @ errors + RIDGE * predictor.weights
    assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-4)
    assert torch.allclose(predictor.intercept, vectors.mean(0), atol=1e-6)
    expected = (directions @ predictor.weights + predictor.intercept).clamp(min=0)
    assert torch.allclose(predictor.predict(images), expected, atol=1e-5)


def test_images_without_a_common_n_gram_have_no_predictor() -> None:
    captions = encode_captions([[["a"]], [["b"]]], WORDS)
    captions.tokens[captions.tokens == END_ID] = torch.tensor([10, 11], dtype=torch.int32)
    assert fit_predictor(make_decoder(), [torch.eye(3)[:2]], ngram_targets(captions)) is None


def test_an_ensemble_predicts_the_mean_of_its_members() -> None:
    (_, some, first), (_, others, second) = fitted(seed=0), fitted(seed=1)
    merged = merge_predictors([first, second])
    assert merged is not None
    assert merged.mean.shape == (2, 6)
    expected = (
        torch.nn.functional.normalize(some - first.mean, dim=1) @ first.weights
        + torch.nn.functional.normalize(others - second.mean, dim=1) @ second.weights
        + first.intercept
        + second.intercept
    ) / 2
    found = merged.predict(torch.cat([some, others], dim=1))
    assert torch.allclose(found, expected.clamp(min=0), atol=1e-5)
    assert merge_predictors([first, None]) is None
    assert merge_predictors([first, fitted(images=70)[2]]) is None


def hypotheses(captions: Sequence[Sequence[int]], scores: Sequence[float]) -> list[Hypothesis]:
    return [Hypothesis([*c], s * 2, s) for c, s in zip(captions, scores, strict=True)]


def test_captions_are_ranked_by_their_cosine_with_the_prediction() -> None:
    groups, _ = made_up(80)
    rarity = rarity_of(groups)
    _, images, predictor = fitted()
    column = {key: number for number, key in enumerate(predictor.keys.tolist())}
    predicted = predictor.predict(images[:5])
    lots = random.Random(2)
    found, expected = [], []
    for image in range(5):
        # Among them one that training has word by word, one with nothing known, and repeats.
        candidates = [groups[0][0][:-1], [99, 98], [4, 4, 4, 4, 4], [4]]
        candidates += [lots.choices(range(4, 12), k=lots.randint(2, 14)) for _ in range(6)]
        scores = [lots.uniform(-3, 0) for _ in candidates]
        found.append(hypotheses(candidates, scores))
        for tokens, score in zip(candidates, scores, strict=True):
            counts = ngrams((*tokens, END_ID))
            frequent = {g for g in counts if key_of(g) in column}
            # N-grams that are not predicted count as those that no training image has.
            values = {g: idf(rarity, g) if g in frequent else math.log(80) for g in counts}
            norms = [
                math.sqrt(sum((counts[g] * values[g]) ** 2 for g in counts if len(g) == n)) or 1.0
                for n in range(1, 5)
            ]
            agreement = sum(
                float(predicted[image, column[key_of(g)]]) * values[g] / norms[len(g) - 1]
                for g in frequent
            )
            expected.append((image, tuple(tokens), score + 1.7 * agreement * 10 / 4))
    ranked = rank_by_consensus(predictor, images[:5], found, weight=1.7)
    scored = {(n, tuple(h.tokens)): h.score for n, group in enumerate(ranked) for h in group}
    for image, caption, score in expected:
        assert scored[image, caption] == pytest.approx(score, abs=1e-4)
    for group in ranked:
        assert [h.score for h in group] == sorted((h.score for h in group), reverse=True)
        for h in group:
            assert h.added["consensus"] == pytest.approx(h.score - h.log_probability / 2)


def test_a_batch_equals_one_by_one_in_many_threads() -> None:
    _, images, predictor = fitted()
    found = [hypotheses([[4, 5, n % 8 + 4], [6, 7], [8, 4]], [-1, -1.1, -0.9]) for n in range(40)]

    def alone(n: int) -> list[Hypothesis]:
        return rank_by_consensus(predictor, images[n : n + 1], found[n : n + 1], 2.0)[0]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            each = list(pool.map(alone, range(40)))
    finally:
        sys.setswitchinterval(interval)
    for some, others in zip(
        rank_by_consensus(predictor, images[:40], found, 2.0), each, strict=True
    ):
        assert [h.tokens for h in some] == [h.tokens for h in others]
        assert [h.score for h in some] == pytest.approx([h.score for h in others], abs=1e-5)


def test_of_many_images_a_sample_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled_images(1).tolist() == [0]
    assert sampled_images(10_000).tolist() == list(range(10_000))
    assert len(sampled_images(10_001)) == 5_001
    monkeypatch.setattr(module, "MOST_IMAGES", 4)
    assert sampled_images(10).tolist() == [0, 3, 6, 9]
    groups, captions = made_up(10)
    kept = captions.of_images(sampled_images(10))
    expected = encode_captions(
        [[WORDS.decode(caption[:-1]) for caption in groups[p]] for p in (0, 3, 6, 9)], WORDS
    )
    torch.testing.assert_close(vars(kept), vars(expected))
