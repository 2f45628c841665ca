"""Greedy and beam search: they agree with each other, with the model, and with brute force."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, UNKNOWN_ID
from pipeline.decoding.captions import token_log_probabilities
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.reranking import Reranker, best_captions, diverse_captions
from pipeline.decoding.sampling import sample
from pipeline.decoding.search import beam_search, greedy_search, search
from pipeline.models.decoder import Decoder, DecoderConfig

VOCABULARY = 30


def make_decoder(vocabulary: int = VOCABULARY, sharpness: float = 4.0) -> Decoder:
    """A small decoder with random weights, sharp enough to prefer some words."""
    torch.manual_seed(3)
    decoder = Decoder(DecoderConfig(vocabulary, embed_size=16, hidden_size=24, feature_size=8))
    with torch.no_grad():
        decoder.projection.weight *= sharpness * 3
        decoder.word_embedding.weight *= 10
        decoder.image_embedding.weight *= 50
    return decoder.eval()


def some_features(count: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


def teacher_forced(decoder: Decoder, features: Tensor, words: list[int]) -> float:
    """Log-probability of the words and the <end>, computed without any search."""
    tokens = torch.tensor([[START_ID, *words]])
    with torch.no_grad():
        outputs = decoder(features.unsqueeze(0), tokens)
        log_probabilities = decoder.projection(outputs)[0].log_softmax(-1)
    targets = [*words, END_ID]
    return float(log_probabilities[torch.arange(len(targets)), targets].sum())


@pytest.mark.parametrize("max_length", [1, 3, 12])
def test_one_beam_is_greedy(max_length: int) -> None:
    decoder, features = make_decoder(), some_features(40)
    config = SearchConfig(beam_size=1, max_length=max_length)
    greedy = greedy_search(decoder, features, config)
    beams = beam_search(decoder, features, config)
    assert [b[0].tokens for b in beams] == [g.tokens for g in greedy]
    assert [b[0].log_probability for b in beams] == pytest.approx(
        [g.log_probability for g in greedy], abs=1e-4
    )
    assert len({tuple(g.tokens) for g in greedy}) > 5, "the decoder should not be constant"


@pytest.mark.parametrize("beam_size", [1, 3, 5])
def test_batched_equals_one_by_one(beam_size: int) -> None:
    decoder, features = make_decoder(), some_features(17)
    config = SearchConfig(beam_size=beam_size, max_length=9)
    together = search(decoder, features, config)
    alone = [search(decoder, row.unsqueeze(0), config)[0] for row in features]
    assert [[h.tokens for h in t] for t in together] == [[h.tokens for h in a] for a in alone]


@pytest.mark.parametrize("beam_size", [1, 4])
def test_returned_score_is_the_teacher_forced_log_probability(beam_size: int) -> None:
    decoder, features = make_decoder(), some_features(12)
    config = SearchConfig(beam_size=beam_size, max_length=8, length_penalty=0.7)
    for row, hypotheses in zip(features, search(decoder, features, config), strict=True):
        for hypothesis in hypotheses:
            expected = teacher_forced(decoder, row, hypothesis.tokens)
            assert hypothesis.log_probability == pytest.approx(expected, abs=1e-4)
            length = len(hypothesis.tokens) + 1
            assert hypothesis.score == pytest.approx(expected / length**0.7, abs=1e-4)


def test_a_wide_beam_finds_the_best_caption_of_all() -> None:
    """With as many beams as there are openings, beam search is exhaustive search."""
    decoder, features = make_decoder(vocabulary=8, sharpness=1.0), some_features(6)
    words = range(UNKNOWN_ID + 1, 8)
    config = SearchConfig(beam_size=90, max_length=3, length_penalty=0.0)
    captions = [c for n in (1, 2, 3) for c in itertools.product(words, repeat=n)]
    assert len(captions) == 84
    for row, hypotheses in zip(features, beam_search(decoder, features, config), strict=True):
        scored = sorted(
            ((teacher_forced(decoder, row, list(c)), c) for c in captions), reverse=True
        )
        assert tuple(hypotheses[0].tokens) == scored[0][1]
        assert {tuple(h.tokens) for h in hypotheses} == set(captions)
        assert len(hypotheses) == 84


@pytest.mark.parametrize("beam_size", [1, 3])
def test_special_tokens_never_come_out(beam_size: int) -> None:
    decoder = make_decoder()
    with torch.no_grad():  # a model that wants nothing but the forbidden
        decoder.projection.bias[[PAD_ID, START_ID, UNKNOWN_ID]] = 100.0
    config = SearchConfig(beam_size=beam_size, max_length=7)
    for hypotheses in search(decoder, some_features(9), config):
        for hypothesis in hypotheses:
            assert min(hypothesis.tokens) > UNKNOWN_ID


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_a_model_that_never_or_at_once_ends_still_gives_captions(
    beam_size: int, bias: float
) -> None:
    decoder = make_decoder()
    with torch.no_grad():
        decoder.projection.bias[END_ID] = bias
    config = SearchConfig(beam_size=beam_size, max_length=6, min_length=2)
    results = search(decoder, some_features(5), config)
    assert len(results) == 5
    for hypotheses in results:
        assert len(hypotheses) == beam_size
        assert {len(h.tokens) for h in hypotheses} == ({6} if bias < 0 else {2})


def test_samples_come_as_often_as_the_model_says() -> None:
    decoder, features = make_decoder(vocabulary=8, sharpness=1.0), some_features(2)
    config = SearchConfig(max_length=3, length_penalty=0.0)
    torch.manual_seed(0)
    for row, drawn in zip(features, sample(decoder, features, 20_000, config), strict=True):
        assert len(drawn) == 20_000
        counts = Counter(tuple(hypothesis.tokens) for hypothesis in drawn)
        # The first word is one of the vocabulary's own, as a caption has at least one.
        logits, _ = decoder.step(torch.tensor([START_ID]), decoder.start(row.unsqueeze(0)))
        first = logits[0].softmax(-1)
        allowed = first[4:] / first[4:].sum()
        for word in range(4, 8):
            share = sum(n for words, n in counts.items() if words[0] == word) / 20_000
            expected = float(allowed[word - 4])
            assert share == pytest.approx(expected, abs=4 * (expected / 20_000) ** 0.5 + 1e-4)
        for hypothesis in drawn[:50]:
            expected = teacher_forced(decoder, row, hypothesis.tokens)
            assert hypothesis.log_probability == pytest.approx(expected, abs=1e-4)
            assert 1 <= len(hypothesis.tokens) <= 3


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_prefix_begins_every_caption_and_counts_in_its_probability(beam_size: int) -> None:
    decoder, features = make_decoder(), some_features(9)
    prefix = (7, 11, 7)
    config = SearchConfig(beam_size=beam_size, max_length=8, prefix=prefix)
    for image, found in zip(features, search(decoder, features, config), strict=True):
        assert len(found) == beam_size
        for hypothesis in found:
            assert tuple(hypothesis.tokens[:3]) == prefix
            expected = teacher_forced(decoder, image, hypothesis.tokens)
            assert hypothesis.log_probability == pytest.approx(expected, abs=1e-3)
        assert len({tuple(hypothesis.tokens) for hypothesis in found}) == beam_size


def test_a_prefix_as_long_as_a_caption_may_be_is_the_caption() -> None:
    config = SearchConfig(beam_size=3, max_length=2, prefix=(9, 8))
    for found in search(make_decoder(), some_features(4), config):
        assert [hypothesis.tokens for hypothesis in found] == [[9, 8]]


def test_every_search_keeps_the_shortest_length() -> None:
    decoder, features = make_decoder(), some_features(12)
    short = SearchConfig(beam_size=3, max_length=9)
    assert min(len(h.tokens) for group in search(decoder, features, short) for h in group) < 6
    for sampling in (False, True):
        config = SearchConfig(beam_size=3, max_length=9, min_length=6, sampling=sampling)
        found = search(decoder, features, config)
        assert all(6 <= len(h.tokens) <= 9 for group in found for h in group)


def test_token_probabilities_are_those_of_the_model_and_make_up_the_captions() -> None:
    decoder, features = make_decoder(), some_features(6)
    found = search(decoder, features, SearchConfig(beam_size=4, max_length=7))
    found[2] = []  # an image without captions must not shift the others
    chances = token_log_probabilities(decoder, features, [[h.tokens for h in g] for g in found])
    assert [len(group) for group in chances] == [4, 4, 0, 4, 4, 4]
    for group, of_group in zip(found, chances, strict=True):
        for hypothesis, chance in zip(group, of_group, strict=True):
            assert len(chance) == len(hypothesis.tokens) + 1
            assert sum(chance) == pytest.approx(hypothesis.log_probability, abs=1e-3)


def test_what_is_drawn_for_an_image_does_not_depend_on_the_others() -> None:
    decoder, features = make_decoder(sharpness=0.5), some_features(8)
    config = SearchConfig(beam_size=5, max_length=8, sampling=True, seed=4)
    keys = [3, 1_000_000_007, 5, 2**32 - 1, 9, 10, 11, 12]
    together = search(decoder, features, config, keys)
    for place in (0, 3, 7):
        [alone] = search(decoder, features[place : place + 1], config, keys[place : place + 1])
        assert [h.tokens for h in alone] == [h.tokens for h in together[place]]
    other = search(decoder, features, SearchConfig(5, 8, sampling=True, seed=5), keys)
    assert [[h.tokens for h in g] for g in other] != [[h.tokens for h in g] for g in together]
    alike = search(decoder, features[:1].expand(2, -1), config, [3, 4])
    assert [h.tokens for h in alike[0]] != [h.tokens for h in alike[1]]
    scores = [[h.score for h in group] for group in together]
    assert scores == [sorted(group, reverse=True) for group in scores]


def first_words(config: SearchConfig, count: int = 4000) -> Counter[int]:
    decoder, features = make_decoder(sharpness=30.0), some_features(1)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        [drawn] = sample(decoder, features, count, config)
        found.append([h.tokens[0] for h in drawn])
    assert found[0] == found[1], "draws follow from the seed"
    return Counter(found[0])


def first_word_probabilities(temperature: float) -> Tensor:
    decoder, features = make_decoder(sharpness=30.0), some_features(1)
    logits = decoder.step(torch.tensor([START_ID]), decoder.start(features))[0].clone()
    logits[:, [PAD_ID, START_ID, UNKNOWN_ID, END_ID]] = -torch.inf
    return (logits / temperature).softmax(-1)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_words_are_drawn_as_often_as_the_temperature_says(temperature: float) -> None:
    drawn = first_words(SearchConfig(temperature=temperature))
    wanted = first_word_probabilities(temperature)
    if temperature != 1:  # else the test could not tell
        assert float((wanted - first_word_probabilities(1.0)).abs().max()) > 0.1
    for word in wanted.topk(5).indices.tolist():
        deviation = (float(wanted[word]) * (1 - float(wanted[word])) / 4000) ** 0.5
        assert drawn[word] / 4000 == pytest.approx(float(wanted[word]), abs=4 * deviation + 1e-3)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_top_p_draws_from_the_smallest_set_that_has_that_probability(top_p: float) -> None:
    chances, order = first_word_probabilities(1.0).sort(descending=True)
    size = int((chances.cumsum(0) < top_p).sum()) + 1
    drawn = first_words(SearchConfig(top_p=top_p))
    assert set(drawn) <= set(order[:size].tolist())
    expected = chances[:size] / chances[:size].sum()
    assert drawn[int(order[0])] / 4000 == pytest.approx(float(expected[0]), abs=0.04)
    if top_p > 0.1:
        assert len(drawn) > 1


def test_a_penalty_decides_which_beams_stay_but_is_not_in_their_probabilities() -> None:
    decoder, features = make_decoder(), some_features(8)
    config = SearchConfig(beam_size=4, max_length=7)
    penalty = 3 * torch.rand((8, 8, VOCABULARY), generator=torch.Generator().manual_seed(2))
    found = beam_search(decoder, features, config, penalty)
    plain = beam_search(decoder, features, config)
    assert [[h.tokens for h in g] for g in found] != [[h.tokens for h in g] for g in plain]
    for image, group in zip(features, found, strict=True):
        for hypothesis in group:
            expected = teacher_forced(decoder, image, hypothesis.tokens)
            assert hypothesis.log_probability == pytest.approx(expected, abs=1e-3)
        scores = [hypothesis.score for hypothesis in group]
        assert scores == sorted(scores, reverse=True)


def test_diverse_captions_begin_with_the_best_and_share_fewer_words() -> None:
    decoder, features = make_decoder(sharpness=0.7), some_features(10)
    config = SearchConfig(beam_size=5, max_length=8, diversity=2.0, num_captions=4)
    best = best_captions(decoder, features, config, Reranker())
    diverse = diverse_captions(decoder, features, config, Reranker())
    assert [group[0].tokens for group in diverse] == [group[0].tokens for group in best]

    def shared(groups: list[list[list[int]]]) -> int:
        pairs = (pair for group in groups for pair in itertools.combinations(group, 2))
        return sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))

    beams = [[h.tokens for h in group[:4]] for group in best]
    found = [[h.tokens for h in group] for group in diverse]
    assert all(len({tuple(words) for words in group}) == len(group) == 4 for group in found)
    assert shared(found) < 0.6 * shared(beams)
    for image, group in zip(features, diverse, strict=True):
        for hypothesis in group:  # scores are of the model, without what words cost
            expected = teacher_forced(decoder, image, hypothesis.tokens)
            assert hypothesis.log_probability == pytest.approx(expected, abs=1e-3)
        assert [h.score for h in group[1:]] == sorted((h.score for h in group[1:]), reverse=True)
