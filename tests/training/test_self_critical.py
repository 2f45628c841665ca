"""Self-critical training: its reward is CIDEr-D, and the decoder learns what is rewarded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions
from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, Vocabulary
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.sampling import sample
from pipeline.metrics.coco import Scorer
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.training.self_critical import SAMPLES, Reward, SelfCritical

GROUPS = [
    ["a red dog runs fast".split(), "the red dog runs".split()],
    ["a blue car stands there".split(), "the blue car".split(), "a car".split()],
    ["a green house is on a hill".split(), "the green house".split()],
]
WORDS = Vocabulary.build((words for group in GROUPS for words in group), min_count=1)


def captions() -> EncodedCaptions:
    return encode_captions(GROUPS, WORDS)


def test_the_reward_is_cider_d_with_the_end_as_a_token() -> None:
    sampled = ["a red car".split(), "the blue car".split(), "the green house on a hill".split()]
    reward = Reward(captions())
    # The scorer knows no <end>, so a word that no caption has stands for it.
    scorer = Scorer({str(n): [[*words, "END"] for words in g] for n, g in enumerate(GROUPS)})
    expected = scorer.per_image_cider({str(n): [*words, "END"] for n, words in enumerate(sampled)})
    for image, words in enumerate(sampled):
        [found] = reward(image, [WORDS.encode(words)])
        assert 100 * found == pytest.approx(expected[str(image)])


def make_decoder(dropout: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(len(WORDS), 24, 24, dropout=dropout, feature_size=3))


FEATURES = 3 * torch.eye(3)


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Averaged over many draws, against the exact expectation over all captions of two words."""
    groups = [["x y".split(), "x".split()], ["y y".split(), "y".split()]]
    words = Vocabulary.build((w for g in groups for w in g), min_count=1)
    encoded = encode_captions(groups, words)
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(len(words), 8, 8, dropout=0.0, feature_size=2))
    features = torch.tensor([[2.0, -1.0]])
    critic = SelfCritical(encoded, cross_entropy_weight=0.0, search=SearchConfig(max_length=2))
    # No token but x, y and <end> is ever likely, so that what is forbidden does not matter.
    with torch.no_grad():
        decoder.projection.bias[[PAD_ID, START_ID, 3]] = -30.0

    def log_probability(tokens: list[int]) -> Tensor:
        caption = torch.tensor([[START_ID, *tokens, END_ID]])
        return -decoder.loss(features, caption)[0]

    x, y = words.encode(["x", "y"])
    # Of two words <end> must come next, of none it may not: the policy is not the plain model's
    # there. One gradient step of the estimate is compared with one of the same estimate exact:
    # sum over captions of q(c) r(c) grad log p(c), q being how often c is sampled.
    every = [[x], [y], [x, x], [x, y], [y, x], [y, y]]
    decoder.eval()
    torch.manual_seed(2)
    draws = sample(decoder, features, 60_000, critic.search)[0]
    share = [sum(d.tokens == c for d in draws) / len(draws) for c in every]
    assert sum(share) == pytest.approx(1.0)
    rewards = critic.reward(0, every)
    mean = sum(q * r for q, r in zip(share, rewards, strict=True))
    weight = decoder.projection.weight
    exact = torch.autograd.grad(
        sum(
            (
                -q * (r - mean) * log_probability(c)
                for q, r, c in zip(share, rewards, every, strict=True)
            ),
            start=torch.zeros(()),
        ),
        weight,
    )[0]
    images = torch.zeros(400, dtype=torch.int64)
    total = torch.zeros_like(weight)
    for _ in range(25):
        loss, count = critic.loss(decoder, features.expand(400, -1), images, 0.0)
        assert count == 400 * SAMPLES
        total += torch.autograd.grad(loss / count, weight)[0] / 25
    assert exact.abs().max() > 0.01
    assert (total - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.05])
def test_the_decoder_learns_what_is_rewarded(cross_entropy_weight: float) -> None:
    decoder = make_decoder(dropout=0.1)
    critic = SelfCritical(captions(), cross_entropy_weight)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    images = torch.arange(3).repeat(4)
    means = []
    for _ in range(4):
        critic.reset()
        for _ in range(60):
            decoder.train()
            loss, count = critic.loss(decoder, FEATURES[images], images, 0.1)
            assert decoder.training
            assert math.isfinite(loss.item())
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
        assert critic.sampled == 60 * 12 * SAMPLES
        means.append(100 * critic.reward_sum / critic.sampled)
    assert means[0] < 150
    assert means[-1] > 250
