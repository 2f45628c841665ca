"""The choice among a search's captions by second opinions, and its defaults."""

from __future__ import annotations

import pytest
import torch

from pipeline.consensus import Consensus, choose_neighbours
from pipeline.dataset import encode_captions
from pipeline.decoder import Decoder, DecoderConfig
from pipeline.errors import UserError
from pipeline.matching import Matcher, MatcherConfig
from pipeline.reranking import Reranker, best_captions, search_config
from pipeline.search import SearchConfig, search
from pipeline.vocabulary import Vocabulary

WORDS = Vocabulary.build(["a b c d e f g h".split()], 1)
GROUPS = [["a b c".split()] * 3, ["d e f".split()] * 3, ["g h".split()]]


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(len(WORDS), 6, 8, feature_size=3)).eval()


def make_reranker(decoder: Decoder) -> Reranker:
    captions = encode_captions(GROUPS, WORDS)
    neighbours = choose_neighbours(decoder, torch.arange(3), [torch.eye(3)], captions)
    matcher = Matcher(MatcherConfig(len(WORDS), size=4, feature_size=3)).eval()
    return Reranker(Consensus(neighbours), matcher)


def test_without_weight_or_second_opinion_the_search_stands() -> None:
    decoder, features = make_decoder(), torch.randn(4, 3)
    plain = search(decoder, features, SearchConfig(4))
    assert best_captions(decoder, features, SearchConfig(4), make_reranker(decoder)) == plain
    weighty = SearchConfig(4, consensus=2.0, matching=2.0)
    assert best_captions(decoder, features, weighty, Reranker()) == plain


@pytest.mark.parametrize("weights", [(2.0, 0.0), (0.0, 3.0), (2.0, 3.0)])
def test_scores_are_the_weighted_sum(weights: tuple[float, float]) -> None:
    decoder, features = make_decoder(), torch.randn(4, 3)
    reranker = make_reranker(decoder)
    consensus, matching = weights
    plain = search(decoder, features, SearchConfig(4))
    config = SearchConfig(4, consensus=consensus, matching=matching)
    ranked = best_captions(decoder, features, config, reranker)
    changed = False
    assert reranker.matcher is not None and reranker.consensus is not None
    for picture, before, after in zip(features, plain, ranked, strict=True):
        assert {tuple(h.tokens) for h in before} == {tuple(h.tokens) for h in after}
        scores = [h.score for h in after]
        assert scores == sorted(scores, reverse=True)
        changed |= [h.tokens for h in before] != [h.tokens for h in after]
        [cosines] = reranker.matcher.fit(picture.unsqueeze(0), [[h.tokens for h in before]])
        with torch.no_grad():
            image = decoder.embed_image(picture.unsqueeze(0))[0][:, 0]
        for hypothesis, cosine in zip(before, cosines.tolist(), strict=True):
            [[alone]] = reranker.consensus.rank(image, [[hypothesis]], consensus)
            [same] = [h for h in after if h.tokens == hypothesis.tokens]
            assert same.score == pytest.approx(alone.score + matching * cosine, abs=1e-5)
            assert same.log_probability == hypothesis.log_probability
    assert changed


def test_defaults_depend_on_what_the_model_has() -> None:
    both = make_reranker(make_decoder())
    one = Reranker(consensus=both.consensus)
    assert search_config(Reranker()) == SearchConfig(3)
    assert search_config(one) == SearchConfig(10, consensus=2.0)
    assert search_config(both) == SearchConfig(10, consensus=2.0, matching=2.0)
    assert search_config(both, consensus=0.0) == SearchConfig(10, matching=2.0)
    assert search_config(both, consensus=0.0, matching=0.0) == SearchConfig(3)
    assert search_config(both, beam_size=7, matching=1.0) == SearchConfig(
        7, consensus=2.0, matching=1.0
    )
    assert search_config(both, beam_size=1) == SearchConfig(1)
    together = SearchConfig(20, consensus=2.0, matching=2.0)
    assert search_config(both, decoders=3) == together
    assert search_config(Reranker(), decoders=3) == SearchConfig(3)
    assert search_config(both, least=12).beam_size == 12
    assert search_config(Reranker(), least=2).beam_size == 3


@pytest.mark.parametrize("option", ["consensus", "matching"])
def test_what_the_model_lacks_cannot_be_asked_for(option: str) -> None:
    with pytest.raises(UserError, match=f"--{option} 2: this model has not"):
        search_config(Reranker(), **{option: 2.0})  # type: ignore[arg-type]
    assert search_config(Reranker(), **{option: 0.0}) == SearchConfig(3)  # type: ignore[arg-type]
