"""Ranking by similar training images: exact, and it prefers what those images have."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions
from pipeline.datasets.vocabulary import END_ID, Vocabulary
from pipeline.decoding.consensus import NEIGHBOURS, TEMPERATURE, Consensus
from pipeline.decoding.hypothesis import Hypothesis
from pipeline.metrics.cider import Idf, cider_d, ngrams
from pipeline.models import neighbours as module
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.neighbours import Neighbours, choose_neighbours, sampled_images

WORDS = Vocabulary.build([[*"abcdefgh"]], min_count=1)


def made_up(images: int, seed: int = 0) -> tuple[list[list[list[str]]], EncodedCaptions]:
    """Give captions of few words, which repeat n-grams within a caption and across images."""
    lots = random.Random(seed)
    groups = [
        [lots.choices("abcdefgh", k=lots.randint(1, 12)) for _ in range(lots.randint(1, 5))]
        for _ in range(images)
    ]
    return groups, encode_captions(groups, WORDS)


def neighbours_of(captions: EncodedCaptions, images: int, seed: int = 0) -> Neighbours:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(images, 6, generator=generator), dim=1)
    return Neighbours(torch.zeros(6), directions.half(), captions)


def hypotheses(captions: Sequence[Sequence[int]], scores: Sequence[float]) -> list[Hypothesis]:
    return [Hypothesis([*c], s * 2, s) for c, s in zip(captions, scores, strict=True)]


def by_hand(
    groups: list[list[list[str]]], neighbours: Neighbours, image: Tensor, tokens: list[int]
) -> float:
    """CIDEr-D with every training image's captions, weighed by the softmax of its cosine."""
    encoded = [[[*WORDS.encode(c), END_ID] for c in group] for group in groups]
    rarity = Idf({g for caption in group for g in ngrams(caption)} for group in encoded)
    cosines = neighbours.directions.float() @ torch.nn.functional.normalize(image, dim=0)
    near = min(NEIGHBOURS, len(groups))
    values, photos = cosines.topk(near)
    shares = (values / TEMPERATURE).softmax(0).tolist()
    candidate = rarity.tf_idf(ngrams([*tokens, END_ID]))
    return sum(
        share * cider_d(candidate, [rarity.tf_idf(ngrams(c)) for c in encoded[photo]]) / 100
        for share, photo in zip(shares, photos.tolist(), strict=True)
    )


@pytest.mark.parametrize("photos", [2, 40, 150])
def test_agreement_is_cider_d_with_the_captions_of_the_nearest(photos: int) -> None:
    groups, captions = made_up(photos)
    neighbours = neighbours_of(captions, photos)
    ranking = Consensus(neighbours)
    images = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    lots = random.Random(2)
    for image in images:
        # Among them one that training has word by word, one with nothing known, and repeats.
        candidates = [WORDS.encode(groups[0][0]), [99, 98], [4, 4, 4, 4, 4], [4]]
        candidates += [lots.choices(range(4, 12), k=lots.randint(1, 14)) for _ in range(6)]
        scores = [lots.uniform(-3, 0) for _ in candidates]
        [ranked] = ranking.rank(image[None], [hypotheses(candidates, scores)], weight=1.7)
        found = {tuple(h.tokens): h.score for h in ranked}
        for tokens, score in zip(candidates, scores, strict=True):
            expected = score + 1.7 * by_hand(groups, neighbours, image, tokens)
            assert found[tuple(tokens)] == pytest.approx(expected, abs=1e-4)
        assert [h.score for h in ranked] == sorted(found.values(), reverse=True)
        assert {h.log_probability for h in ranked} == {s * 2 for s in scores}


def test_a_batch_equals_one_by_one() -> None:
    _, captions = made_up(80)
    ranking = Consensus(neighbours_of(captions, 80))
    images = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    found = [hypotheses([[4, 5, n + 4], [6, 7], [8, 4]], [-1, -1.1, -0.9]) for n in range(7)]
    together = ranking.rank(images, found, 2.0)
    alone = [ranking.rank(images[n : n + 1], found[n : n + 1], 2.0)[0] for n in range(7)]
    for some, others in zip(together, alone, strict=True):
        assert [h.tokens for h in some] == [h.tokens for h in others]
        assert [h.score for h in some] == pytest.approx([h.score for h in others], abs=1e-5)


def test_threads_may_share_one() -> None:
    _, captions = made_up(80)
    ranking = Consensus(neighbours_of(captions, 80))
    images = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    found = [hypotheses([[4, 5, n % 8 + 4], [6, 7], [8, 4]], [-1, -1.1, -0.9]) for n in range(40)]
    expected = ranking.rank(images, found, 2.0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for ranked in pool.map(lambda _: ranking.rank(images, found, 2.0), range(24)):
                assert ranked == expected
    finally:
        sys.setswitchinterval(interval)


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(len(WORDS), 6, 8, feature_size=3)).eval()


def test_what_similar_images_have_is_chosen() -> None:
    groups = [["a b c".split()] * 3, ["d e f".split()] * 3, ["g h".split()]]
    captions = encode_captions(groups, WORDS)
    decoder, features = make_decoder(), 4 * torch.eye(3)
    ranking = Consensus(choose_neighbours(decoder, torch.arange(3), [features], captions))
    with torch.no_grad():
        images = decoder.embed_image(features)[0][:, 0]
    candidates = [WORDS.encode(words.split()) for words in ("a b c", "d e f", "g h")]
    for image in range(3):
        found = hypotheses(candidates, [-1.0, -1.0, -1.0])
        [ranked] = ranking.rank(images[image : image + 1], [found], 1.0)
        assert ranked[0].tokens == candidates[image]


def test_of_many_images_a_sample_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled_images(1).tolist() == [0]
    assert sampled_images(10_000).tolist() == list(range(10_000))
    assert len(sampled_images(10_001)) == 5_001
    monkeypatch.setattr(module, "MOST_IMAGES", 4)
    groups, captions = made_up(10)
    kept = sampled_images(10)
    assert kept.tolist() == [0, 3, 6, 9]
    features = torch.randn(10, 3)
    neighbours = choose_neighbours(make_decoder(), kept, [features[kept]], captions)
    assert len(neighbours.directions) == 4
    assert neighbours.captions.images.tolist() == [
        number for number, p in enumerate(kept.tolist()) for _ in groups[p]
    ]
    expected = encode_captions([groups[p] for p in kept.tolist()], WORDS)
    assert torch.equal(neighbours.captions.tokens, expected.tokens)
    assert torch.equal(neighbours.captions.offsets, expected.offsets)
