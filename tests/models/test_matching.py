"""How well a caption fits an image: the loss, what is learned, what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import invoke
from same_weights import assert_same_weights
from small_data import COLOURS, THINGS, make_small_data
from torch import Tensor

import train_decoder
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.encoded_captions import encode_captions, tokenized
from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, Vocabulary
from pipeline.features.cache import FeatureCache
from pipeline.features.feature_set import FeatureSet, feature_statistics
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.training.matcher_training import train_matcher


def make_matcher(vocabulary: int = 12) -> Matcher:
    torch.manual_seed(0)
    return Matcher(MatcherConfig(vocabulary, size=8, feature_size=5)).eval()


def test_loss_is_the_symmetric_cross_entropy() -> None:
    """Against torch's own cross-entropy, where every caption is of another image."""
    matcher = make_matcher()
    features, captions = torch.randn(4, 5), torch.randint(4, 12, (4, 6))
    images = F.normalize(matcher.image_embedding(features), dim=1)
    texts = F.normalize(matcher.word_embedding(captions).mean(1), dim=1)  # equal weights at first
    logits = images @ texts.t() / 0.07
    expected = F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(
        logits.t(), torch.arange(4)
    )
    loss = matcher.loss(features, captions, torch.arange(4))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_captions_of_one_image_do_not_count_against_each_other() -> None:
    """Two captions of the same image share the target, so a perfect matcher has log 2, not 0."""
    matcher = make_matcher()
    features = torch.eye(5)[:2].repeat_interleave(2, 0)
    images = torch.tensor([0, 0, 1, 1])
    captions = torch.tensor([[4], [4], [5], [5]])
    with torch.no_grad():
        matcher.log_scale.fill_(math.log(1000))
        matcher.image_embedding.bias.zero_()
        matcher.image_embedding.weight.zero_()[:2, :2] = torch.eye(2)
        matcher.word_embedding.weight[4:6] = torch.eye(8)[:2]
    assert matcher.loss(features, captions, images).item() == pytest.approx(2 * math.log(2))


def test_padding_and_special_tokens_do_not_count() -> None:
    matcher = make_matcher()
    bare = torch.tensor([[6, 7, 8]])
    full = torch.tensor([[START_ID, 6, 7, 8, END_ID, PAD_ID, PAD_ID]])
    assert torch.allclose(matcher.embed_captions(bare), matcher.embed_captions(full))
    assert not matcher.embed_captions(torch.tensor([[START_ID, END_ID]])).isnan().any()


def test_fit_in_a_batch_equals_one_by_one() -> None:
    matcher, features = make_matcher(), torch.randn(3, 5)
    candidates = [[[4, 5], [6]], [[7, 8, 9, 10]], [[4], [5], [6, 6]]]
    together = matcher.fit(features, candidates)
    for photo, group, cosines in zip(features, candidates, together, strict=True):
        for words, cosine in zip(group, cosines.tolist(), strict=True):
            image = matcher.embed_images(photo.unsqueeze(0))[0]
            text = matcher.embed_captions(torch.tensor([words]))[0]
            assert cosine == pytest.approx((image @ text).item(), abs=1e-6)


class Small:
    """The small data set of numbers: what a matcher is trained on, and val."""

    def __init__(self, folder: Path) -> None:
        data, cache_path = make_small_data(folder)
        table, cache = read_captions(data), FeatureCache(cache_path)
        groups = {split: tokenized(table.of_split(split)) for split in ("train", "val")}
        rows = {s: torch.from_numpy(cache.rows(list(g))) for s, g in groups.items()}
        words = (w for group in groups["train"].values() for w in group)
        self.vocabulary = Vocabulary.build(words, 1)
        self.features = FeatureSet(cache, rows["train"], 1e9)
        self.captions = encode_captions(groups["train"].values(), self.vocabulary)
        self.val_features = torch.from_numpy(cache.read(rows["val"].numpy()))
        self.val_words = [next(iter(group)) for group in groups["val"].values()]

    def train(self, seed: int = 0) -> Matcher:
        decoder = Decoder(DecoderConfig(len(self.vocabulary), 4, 4))
        decoder.set_feature_statistics(*feature_statistics(self.features))
        return train_matcher(self.features, self.captions, decoder, seed)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small"))


def test_it_learns_which_caption_fits(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all colours and things the right ones fit images best that it has not seen."""
    monkeypatch.setattr("pipeline.training.matcher_training.EPOCHS", 60)
    matcher = small.train()
    candidates = [f"a {colour} {thing}".split() for colour in COLOURS for thing in THINGS]
    ids = [small.vocabulary.encode(words) for words in candidates]
    fits = matcher.fit(small.val_features, [ids] * len(small.val_features))
    best = [candidates[int(cosines.argmax())] for cosines in fits]
    right = sum(a == b for a, b in zip(best, small.val_words, strict=True))
    assert right >= 0.9 * len(best)


def test_training_is_repeatable_and_depends_on_the_seed(small: Small) -> None:
    def weights(matcher: Matcher) -> Tensor:
        return matcher.image_embedding.weight

    first, again, other = small.train(), small.train(), small.train(seed=1)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_many_captions_take_no_more_steps(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.matcher_training.MAX_STEPS", 3)
    monkeypatch.setattr("pipeline.training.matcher_training.BATCH_SIZE", 10)
    calls: list[int] = []
    loss = Matcher.loss

    def counted(self: Matcher, features: Tensor, captions: Tensor, images: Tensor) -> Tensor:
        calls.append(len(features))
        return loss(self, features, captions, images)

    monkeypatch.setattr(Matcher, "loss", counted)
    small.train()
    assert calls == [10, 10, 10]


def test_a_kill_before_it_was_trained_is_made_good(tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    run = tmp_path / "run"
    words = f"--data {data} --features {features} --run {run} --epochs 2 --min-count 1 --device cpu"
    options = [*words.split(), "--embed-size", 8, "--hidden-size", 8]
    invoke(train_decoder.main, *options)
    whole = load_checkpoint(run)
    save_checkpoint(run / "best.safetensors", replace(whole, matcher=None))
    assert "finished with epoch 2" in invoke(train_decoder.main, *options).stderr
    again = load_checkpoint(run).matcher
    assert whole.matcher is not None and again is not None
    assert_same_weights(whole.matcher.state_dict(), again.state_dict())
