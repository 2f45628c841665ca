"""Intervals over images and the test of a difference. All captions here are made up."""

from __future__ import annotations

import numpy
import pytest

from pipeline.metrics.bootstrap import PerImage, bootstrap, compare
from pipeline.metrics.coco import Scorer

NOUNS = "dog cat man woman child horse boat tree car ball".split()
PLACES = "beach street field house pool park road snow grass water".split()


def made_up(seed: int, images: int, right: float) -> tuple[PerImage, PerImage]:
    """Give two sets of predictions for the same images, right with probability ``right``."""
    random = numpy.random.default_rng(seed)

    def sentence(noun: int, place: int) -> list[str]:
        return f"a {NOUNS[noun]} is on the {PLACES[place]}".split()

    truth = random.integers(0, 10, (images, 2))
    scorer = Scorer({str(i): [sentence(*pair)] for i, pair in enumerate(truth)})
    sets = []
    for _ in range(2):
        guesses = numpy.where(
            random.random((images, 2)) < right, truth, random.integers(0, 10, (images, 2))
        )
        sets.append(PerImage(scorer, {str(i): sentence(*pair) for i, pair in enumerate(guesses)}))
    return sets[0], sets[1]


def test_images_so_many_times_give_the_scores_of_such_a_set() -> None:
    references = {
        "a": ["a dog runs".split(), "the dog".split()],
        "b": ["two red cars go fast".split()],
    }
    predictions = {"a": "a dog walks fast".split(), "b": "two red cars go home".split()}
    scorer = Scorer(references)
    found = PerImage(scorer, predictions).scores(numpy.array([[1, 1], [0, 2], [3, 3]]))
    expected = scorer.score(predictions)
    for name in ("BLEU-4", "CIDEr-D"):
        assert found[name][[0, 2]] == pytest.approx(expected[name])
    # Of the second image alone: 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples.
    assert found["BLEU-4"][1] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert found["CIDEr-D"][1] == pytest.approx(scorer.per_image_cider(predictions)["b"])


def test_intervals_hold_the_score_and_shrink_with_more_images() -> None:
    widths = []
    for images in (50, 800):
        parts, _ = made_up(0, images, 0.5)
        interval = bootstrap(parts, resamples=400)["CIDEr-D"]
        assert interval.low < parts.cider.mean() < interval.high
        # Of a mean: 1.96 standard errors on each side.
        error = parts.cider.std() / images**0.5
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)
        widths.append(interval.high - interval.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)


def test_intervals_follow_from_the_seed() -> None:
    parts, _ = made_up(0, 50, 0.5)
    assert bootstrap(parts, seed=1) == bootstrap(parts, seed=1) != bootstrap(parts, seed=2)


def test_equal_sets_do_not_differ() -> None:
    parts, _ = made_up(0, 40, 0.5)
    for difference in compare(parts, parts, resamples=100).values():
        assert difference.p_value == 1.0
        assert difference.interval.low == difference.interval.high == 0.0


def test_better_predictions_differ() -> None:
    poor, _ = made_up(0, 100, 0.2)
    good, _ = made_up(0, 100, 0.9)
    assert (poor.bleu[:, 9] == good.bleu[:, 9]).all()
    for difference in compare(poor, good, resamples=400).values():
        assert difference.second > difference.first
        assert difference.interval.low > 0
        assert difference.p_value == 1 / 401


def test_chance_alone_is_seldom_called_a_difference() -> None:
    """Of 120 pairs that do not differ, about one in twenty has a p below 0.05."""
    values = []
    for seed in range(120):
        first, second = made_up(seed, 30, 0.5)
        values.append(compare(first, second, seed=seed, resamples=99)["CIDEr-D"].p_value)
    assert 0 < sum(value <= 0.05 for value in values) <= 15
    assert 0.4 < sum(value <= 0.5 for value in values) / 120 < 0.62
