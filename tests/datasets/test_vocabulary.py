"""The vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.datasets.encoded_captions import encode_captions
from pipeline.datasets.tokenizers import tokenize_characters, tokenize_english
from pipeline.datasets.vocabulary import (
    END,
    END_ID,
    PAD,
    PAD_ID,
    SPECIALS,
    START,
    START_ID,
    UNKNOWN,
    UNKNOWN_ID,
    Vocabulary,
)
from pipeline.utils.errors import UserError


def test_build_sorts_by_count_then_alphabet() -> None:
    captions = [["b", "a", "c"], ["b", "c", "a"], ["b", "rare"]]
    vocabulary = Vocabulary.build(iter(captions), min_count=2)
    assert SPECIALS == (PAD, START, END, UNKNOWN) == ("<pad>", "<start>", "<end>", "<unk>")
    assert (PAD_ID, START_ID, END_ID, UNKNOWN_ID) == (0, 1, 2, 3)
    assert vocabulary.words == (PAD, START, END, UNKNOWN, "b", "a", "c")
    assert len(vocabulary) == 7
    assert "rare" not in vocabulary and "b" in vocabulary
    assert Vocabulary.build(reversed(captions), min_count=2) == vocabulary


def test_min_count_is_five_unless_said_otherwise() -> None:
    assert Vocabulary.build([["five"] * 5 + ["four"] * 4]).words[4:] == ("five",)


@pytest.mark.parametrize("captions", [[], [[]], [["kite", "fox"], ["kite"]]])
def test_no_frequent_word_is_an_error(captions: list[list[str]]) -> None:
    with pytest.raises(UserError, match="--min-count"):
        Vocabulary.build(captions, min_count=3)


def test_encode_and_decode() -> None:
    vocabulary = Vocabulary.build([["a", "a", "kite"]], min_count=1)
    assert vocabulary.encode(["a", "kite", "zebra"]) == [4, 5, UNKNOWN_ID]
    assert vocabulary.encode([]) == []
    assert vocabulary.decode([START_ID, 4, PAD_ID, 5, END_ID, 4]) == ["a", "kite"]
    assert vocabulary.decode([4, UNKNOWN_ID]) == ["a", UNKNOWN]
    assert vocabulary.decode([END_ID]) == vocabulary.decode([]) == []
    for outside in (6, -1):
        with pytest.raises(IndexError):
            vocabulary.decode([outside])


@pytest.mark.parametrize("special", SPECIALS)
def test_a_caption_cannot_make_special_tokens(special: str) -> None:
    captions = [tokenize_english(f"a {special} kite{special}") for _ in range(5)]
    assert captions[0] == ["a", special[1:-1], "kite", special[1:-1]]
    vocabulary = Vocabulary.build(captions)
    assert vocabulary.words[:4] == SPECIALS
    assert all(number > UNKNOWN_ID for number in vocabulary.encode(captions[0]))
    # Nor can tokens that did not come from tokenize.
    assert Vocabulary.build([[special, "kite"]] * 5).words == (*SPECIALS, "kite")
    assert vocabulary.encode([special]) == [UNKNOWN_ID]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "begin with"),
        (["a", "kite"], "begin with"),
        ([PAD, END, START, UNKNOWN, "a"], "begin with"),
        ([*SPECIALS, "a", "kite", "a"], "twice: 'a'"),
        ([*SPECIALS, "a", END], "twice: '<end>'"),
        ([*SPECIALS, 7], "entry 4"),
        ([*SPECIALS, "a", ""], "entry 5"),
        ("<pad>", "not str"),
        (None, "not NoneType"),
        ({"a": 4}, "not dict"),
    ],
)
def test_a_damaged_list_is_an_error(words: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Vocabulary(words)


def test_a_vocabulary_splits_and_writes_with_its_own_tokenizer() -> None:
    chinese = Vocabulary.build([tokenize_characters("一只狗")], 1, "characters")
    assert chinese.detokenize(chinese.tokenize("一只 狗。")) == "一只狗"
    assert Vocabulary.build([["a"]], 1).tokenize("A dog's") == ["a", "dog", "'s"]
    again = Vocabulary(list(chinese.words), "characters")
    assert again == chinese
    assert again.encode(["一", "狗"]) == chinese.encode(["一", "狗"])
    with pytest.raises(UserError, match="no tokenizer 'klingon'; there are english, words, char"):
        Vocabulary(chinese.words, "klingon")
    assert Vocabulary(list(chinese.words), "words") != chinese


def test_long_captions_are_cut_later_where_characters_are_tokens() -> None:
    for name, longest in (("english", 50), ("words", 50), ("characters", 100)):
        vocabulary = Vocabulary.build([["a"]], 1, name)
        assert int(encode_captions([[["a"] * 300]], vocabulary).lengths) == longest + 2
