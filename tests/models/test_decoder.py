"""The decoder: its sizes, its equations step by step, its loss, and that it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from small_data import IDENTITY
from torch import Tensor

from pipeline.datasets.encoded_captions import bucketed_batches, count_batches, encode_captions
from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, Vocabulary
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.search import search
from pipeline.features.cache_writer import open_writer
from pipeline.features.feature_set import FeatureSet, feature_statistics
from pipeline.models.decoder import Decoder, DecoderConfig, dropout
from pipeline.models.encoder_identity import FEATURE_SIZE

SMALL = DecoderConfig(vocabulary_size=12, embed_size=6, hidden_size=7, dropout=0.5, feature_size=5)

EXTENDED = dataclasses.replace(
    SMALL, feature_dropout=0.3, init_state_from_image=True, tie_embeddings=True
)


def test_number_of_weights_follows_from_the_sizes() -> None:
    v, e, h, f = 12, 6, 7, 5
    shared = f * e + e + v * e + 4 * h * (e + h) + 8 * h
    assert sum(p.numel() for p in Decoder(SMALL).parameters()) == shared + h * v + v
    # Tied: from H to E, and a bias a word; first state: from E to 2 H.
    more = (h * e + e) + v + (e * 2 * h + 2 * h)
    assert sum(p.numel() for p in Decoder(EXTENDED).parameters()) == shared + more


@pytest.mark.parametrize("config", [SMALL, EXTENDED])
def test_logits_follow_the_equations_of_the_paper(config: DecoderConfig) -> None:
    """Equations (4) to (12) of arXiv 1411.4555 and the options, written out."""
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    features, tokens = torch.randn(1, 5), torch.tensor([[START_ID, 5, 9]])
    weights = dict(decoder.named_parameters())
    image, words = decoder.image_embedding(features)[0], decoder.word_embedding.weight
    hidden, cell = torch.zeros(7), torch.zeros(7)
    if config.init_state_from_image:
        first = decoder.init_state_from_image(image)
        hidden, cell = first[:7].tanh(), first[7:]
    outputs = []
    for x in [image, *words[tokens[0]]]:
        gates = (
            weights["lstm.weight_ih_l0"] @ x
            + weights["lstm.bias_ih_l0"]
            + weights["lstm.weight_hh_l0"] @ hidden
            + weights["lstm.bias_hh_l0"]
        )
        i, f, g, o = gates.split(7)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    told = torch.stack(outputs[1:])
    if config.tie_embeddings:
        logits = decoder.to_embedding(told) @ words.t() + decoder.projection.bias
    else:
        logits = decoder.projection(told)
    assert torch.allclose(decoder.project(decoder(features, tokens))[0], logits, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, EXTENDED])
def test_stepping_equals_teacher_forcing_also_after_the_weights_changed(
    config: DecoderConfig,
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.1, fused=True)
    features, tokens = torch.randn(3, 5), torch.tensor([[1, 4, 5], [1, 6, 7], [1, 8, 9]])

    def check() -> Tensor:
        whole = decoder.project(decoder(features, tokens))
        state = decoder.start(features)
        for t in range(3):
            logits, state = decoder.step(tokens[:, t], state)
            assert torch.allclose(logits, whole[:, t], atol=1e-5)
        return whole

    first = check()
    decoder.train()
    first.sum().backward()
    optimizer.step()
    decoder.eval()
    assert not torch.allclose(check(), first.detach(), atol=0.1)
    decoder.load_state_dict(Decoder(config).state_dict())
    check()


def test_loss_runs_over_words_and_end_and_ignores_padding() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SMALL).eval()
    features = torch.randn(2, 5)
    captions = torch.tensor([[1, 4, 5, 2, 0, 0], [1, 6, 7, 8, 9, 2]])
    loss, tokens = decoder.loss(features, captions)
    assert tokens == 3 + 5
    first, _ = decoder.loss(features[:1], captions[:1, :4])
    second, _ = decoder.loss(features[1:], captions[1:])
    assert loss.item() == pytest.approx((first + second).item(), rel=1e-5)
    logits = decoder.projection(decoder(features[:1], captions[:1, :3]))[0]
    assert first.item() == pytest.approx(
        F.cross_entropy(logits, captions[0, 1:4], reduction="sum").item(), rel=1e-5
    )


def test_standardisation_makes_the_scale_of_features_irrelevant() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SMALL).eval()
    features = torch.rand(50, 5)
    decoder.set_feature_statistics(features.mean(0), features.std(0, correction=0))
    small, _ = decoder.embed_image(features)
    decoder.set_feature_statistics(1000 * features.mean(0), 1000 * features.std(0, correction=0))
    assert torch.allclose(decoder.embed_image(1000 * features)[0], small, atol=1e-3)


def test_eight_images_are_learned_by_heart() -> None:
    """The decoder can say any caption: eight random vectors, eight captions, exactly."""
    torch.manual_seed(0)
    captions = [
        "a red ball lies on the green grass".split(),
        "two dogs".split(),
        "a man in a blue shirt flies a kite over the sea at night".split(),
        "three small children run".split(),
        "the the the end".split(),
        "a red ball lies on the sea".split(),
        "snow".split(),
        "a woman holds two red balls and a kite".split(),
    ]
    vocabulary = Vocabulary.build(captions, min_count=1)
    features = torch.rand(8, 2048)
    decoder = Decoder(DecoderConfig(len(vocabulary), 64, 128, dropout=0.0))
    decoder.set_feature_statistics(features.mean(0), features.std(0))
    encoded = encode_captions([[c] for c in captions], vocabulary)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01, weight_decay=0.0)
    batch = encoded.padded(torch.arange(8))
    for _ in range(80):
        loss, tokens = decoder.loss(features, batch)
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    decoder.eval()
    for beam_size in (1, 3):
        found = search(decoder, features, SearchConfig(beam_size=beam_size))
        assert [vocabulary.decode(h[0].tokens) for h in found] == captions


def test_captions_are_encoded_and_padded() -> None:
    vocabulary = Vocabulary.build([["a", "dog", "runs"]], min_count=1)
    encoded = encode_captions([[["a", "dog"], ["a", "bird", "runs"]], [["runs"]]], vocabulary)
    assert encoded.images.tolist() == [0, 0, 1]
    assert encoded.lengths.tolist() == [4, 5, 3]
    a, dog, runs = vocabulary.encode(["a", "dog", "runs"])
    unknown = vocabulary.encode(["bird"])[0]
    assert encoded.padded(torch.tensor([2, 1, 0])).tolist() == [
        [START_ID, runs, END_ID, PAD_ID, PAD_ID],
        [START_ID, a, unknown, runs, END_ID],
        [START_ID, a, dog, END_ID, PAD_ID],
    ]


def test_features_are_the_same_from_memory_and_from_the_file(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(5)]
    writer = open_writer(tmp_path / "x.h5", names, IDENTITY)
    values = numpy.random.default_rng(0).standard_normal((5, FEATURE_SIZE)).astype("f4")
    writer.write(range(5), values, {})
    cache = writer.finish()
    rows = torch.tensor([4, 0, 2])
    size = 3 * FEATURE_SIZE * 2
    held, read = (FeatureSet(cache, rows, memory) for memory in (size, size - 1))
    assert (held.size, read.size) == (size, 0)
    images = torch.tensor([2, 0, 2])
    expected = torch.from_numpy(values[[2, 4, 2]]).half().float()
    for features in (held, read):
        assert len(features) == 3
        assert features[images].dtype == torch.float32
        assert torch.equal(features[images], expected)
        mean, deviation = feature_statistics(features)
        assert torch.allclose(mean, torch.from_numpy(values[[4, 0, 2]].mean(0)), atol=1e-2)
        assert torch.allclose(deviation, torch.from_numpy(values[[4, 0, 2]].std(0)), atol=1e-2)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    ones = torch.ones(1001, 1003, requires_grad=True)
    dropped = dropout(ones, probability)
    assert float((dropped.detach() == 0).float().mean()) == pytest.approx(probability, abs=0.003)
    assert float(dropped.detach().mean()) == pytest.approx(1.0, abs=0.005)
    assert len(dropped.unique()) == (1 if probability == 0 else 2)
    dropped.sum().backward()
    assert ones.grad is not None
    assert torch.equal(ones.grad, dropped.detach())
    # No value follows another's: rows and neighbours are as good as independent.
    centred = (dropped.detach() > 0).double() - (1 - probability)
    if probability:
        for shift in (1, 2, 8, 1003):
            both = (centred.flatten()[shift:] * centred.flatten()[:-shift]).mean()
            assert abs(float(both)) < 0.002
    torch.manual_seed(0)
    assert torch.equal(dropout(ones, probability), dropped)


@pytest.mark.parametrize("items", [1, 7, 64, 1000])
def test_buckets_hold_every_item_once_in_an_order_of_the_seed(items: int) -> None:
    lengths = torch.randint(3, 20, (items,), generator=torch.Generator().manual_seed(0))

    def batches(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [b.tolist() for b in bucketed_batches(lengths, 8, generator)]

    assert sorted(i for b in batches(0) for i in b) == list(range(items))
    assert len(batches(0)) == count_batches(items, 8)
    assert batches(0) == batches(0)
    if items == 1000:
        assert batches(0) != batches(1)
        padded = sum(len(b) * int(lengths[b].max()) for b in batches(0))
        assert padded < 1.1 * int(lengths.sum()), "batches hold captions of like length"
