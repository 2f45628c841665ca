"""The choice among a search's captions by rerankers, and its defaults."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.datasets.encoded_captions import encode_captions
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.captions import token_log_probabilities
from pipeline.decoding.consensus import rank_by_consensus
from pipeline.decoding.options import SearchConfig, SearchOptions
from pipeline.decoding.reranking import Reranker, best_captions
from pipeline.decoding.search import search
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.models.ngram_predictor import fit_predictor, ngram_targets
from pipeline.utils.errors import UserError

WORDS = Vocabulary.build(["a b c d e f g h".split()], 1)
GROUPS = [["a b c".split()] * 3, ["d e f".split()] * 3, ["g h".split()]] * 2


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(len(WORDS), 6, 8, feature_size=3)).eval()


def make_reranker(decoder: Decoder) -> Reranker:
    targets = ngram_targets(encode_captions(GROUPS, WORDS))
    predictor = fit_predictor(decoder, [torch.eye(3), torch.eye(3)], targets)
    matcher = Matcher(MatcherConfig(len(WORDS), size=4, feature_size=3)).eval()
    return Reranker(predictor, matcher)


def test_without_weight_or_reranker_the_search_stands() -> None:
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
    assert reranker.matcher is not None and reranker.predictor is not None
    for photo, before, after in zip(features, plain, ranked, strict=True):
        assert {tuple(h.tokens) for h in before} == {tuple(h.tokens) for h in after}
        scores = [h.score for h in after]
        assert scores == sorted(scores, reverse=True)
        changed |= [h.tokens for h in before] != [h.tokens for h in after]
        [cosines] = reranker.matcher.fit(photo.unsqueeze(0), [[h.tokens for h in before]])
        with torch.no_grad():
            image = decoder.embed_image(photo.unsqueeze(0))[0][:, 0]
        for hypothesis, cosine in zip(before, cosines.tolist(), strict=True):
            [[alone]] = rank_by_consensus(reranker.predictor, image, [[hypothesis]], consensus)
            [same] = [h for h in after if h.tokens == hypothesis.tokens]
            assert same.score == pytest.approx(alone.score + matching * cosine, abs=1e-5)
            assert same.log_probability == hypothesis.log_probability
    assert changed


def resolve(reranker: Reranker, decoders: int = 1, **options: Any) -> SearchConfig:
    return SearchOptions(**options).resolve(WORDS, reranker, decoders)


def test_defaults_depend_on_what_the_model_has() -> None:
    none, both = Reranker(), make_reranker(make_decoder())
    one = Reranker(predictor=both.predictor)
    assert resolve(none) == SearchConfig(3)
    assert resolve(one) == SearchConfig(10, consensus=3.0)
    assert resolve(both) == SearchConfig(10, consensus=3.0, matching=2.0)
    assert resolve(both, consensus=0.0) == SearchConfig(10, matching=2.0)
    assert resolve(both, consensus=0.0, matching=0.0) == SearchConfig(3)
    assert resolve(both, beam_size=7, matching=1.0) == SearchConfig(7, consensus=3.0, matching=1.0)
    assert resolve(both, beam_size=1) == SearchConfig(1)
    assert resolve(both, decoders=3) == SearchConfig(20, consensus=3.0, matching=2.0)
    assert resolve(none, decoders=3) == SearchConfig(3)
    assert resolve(both, num_captions=12).beam_size == 12
    assert resolve(none, num_captions=2) == SearchConfig(3, num_captions=2)
    drawn = resolve(both, temperature=0.5, num_captions=4, seed=7)
    assert drawn == SearchConfig(4, sampling=True, temperature=0.5, seed=7, num_captions=4)
    assert resolve(none, diverse=True, num_captions=2).diversity == 1.0
    assert resolve(none, prefix="b a").prefix == tuple(WORDS.encode(["b", "a"]))
    passes = resolve(both, search_passes=5, decoders=3)
    assert (passes.beam_size, passes.consensus, passes.matching) == (10, 3.0, 4.0)
    assert resolve(both, consensus=1.0, matching=0.0, search_passes=5).consensus == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consensus": 2.0}, "--consensus 2: this model has no n-gram predictor"),
        ({"matching": 2.0}, "--matching 2: this model has no matcher"),
        ({"prefix": "a zebra"}, "--prefix: the model does not know 'zebra'"),
        ({"prefix": "a b c", "max_length": 2}, "--prefix: has 3 words"),
        ({"min_length": 21}, "--min-length 21: must not be above --max-length 20"),
        ({"min_length": 5, "max_length": 4}, "--min-length 5: must not be above --max-length 4"),
        ({"num_captions": 4, "beam_size": 3}, "--num-captions 4: needs a --beam-size of at least"),
        ({"diverse": True}, "--diverse: is for several captions"),
        ({"diverse": True, "num_captions": 2, "top_p": 0.9}, "--diverse: drawn captions differ"),
        ({"search_passes": 2, "beam_size": 1}, "--search-passes 2"),
        ({"search_passes": 2, "temperature": 1.0}, "--search-passes 2"),
        ({"search_passes": 2}, "--search-passes 2: pools candidates for reranking"),
        ({"consensus": 2.0, "beam_size": 1}, "--consensus: has nothing to choose from"),
    ],
)
def test_options_without_effect_and_contradictions_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(Reranker(), **options)


def test_search_passes_add_other_captions_to_choose_from() -> None:
    decoder, features = make_decoder(), torch.randn(6, 3)
    with torch.no_grad():  # so sharp that a later pass finds some captions again
        decoder.projection.weight *= 10
    reranker = make_reranker(decoder)
    one = SearchConfig(4, max_length=6, consensus=2.0, matching=3.0)
    three = replace(one, search_passes=3)
    before = best_captions(decoder, features, one, reranker)
    after = best_captions(decoder, features, three, reranker)
    for first, of_all in zip(before, after, strict=True):
        words = [tuple(h.tokens) for h in of_all]
        assert len(set(words)) == len(words)
        assert {tuple(h.tokens) for h in first} <= set(words)
        assert of_all[0].score >= first[0].score
        scores = [h.score for h in of_all]
        assert scores == sorted(scores, reverse=True)
    assert any(b[0].score > a[0].score for a, b in zip(before, after, strict=True))
    assert sum(map(len, before)) < sum(map(len, after)) < 3 * sum(map(len, before))
    found = [[h.tokens for h in group] for group in after]
    chances = token_log_probabilities(decoder, features, found)
    for group, each in zip(after, chances, strict=True):
        assert [h.log_probability for h in group] == pytest.approx(list(map(sum, each)), abs=1e-3)
    for image in (0, 5):
        [alone] = best_captions(decoder, features[image : image + 1], three, reranker)
        assert [h.tokens for h in alone] == found[image]


def test_without_rerankers_the_best_of_all_passes_is_taken() -> None:
    decoder, features = make_decoder(), torch.randn(6, 3)
    plain = best_captions(decoder, features, SearchConfig(4), Reranker())
    passes = best_captions(decoder, features, SearchConfig(4, search_passes=3), Reranker())
    for more, few in zip(passes, plain, strict=True):
        assert {tuple(h.tokens) for h in few} <= {tuple(h.tokens) for h in more}
        scores = [h.score for h in more]
        assert scores == sorted(scores, reverse=True) and scores[0] >= few[0].score
