"""Captions as text for people."""

from __future__ import annotations

import pytest

from pipeline.datasets.tokenizers import TOKENIZERS
from pipeline.decoding.captions import Caption, Word, as_sentence


@pytest.mark.parametrize(
    "tokenizer, text, expected",
    [
        ("english", "a dog's ball", "A dog's ball."),
        ("english", "he runs down market st.", "He runs down market st."),
        ("english", "2 dogs", "2 dogs."),
        ("english", "", ""),
        ("words", "über den fluß", "Über den fluß."),
        ("words", "ßa", "ßa."),
        ("words", "đường phố", "Đường phố."),
        ("words", "собака бежит", "Собака бежит."),
        ("words", "ძაღლი გარბის", "ძაღლი გარბის."),
        ("words", "एक कुत्ता दौड़ता है", "एक कुत्ता दौड़ता है।"),
        ("words", "կարմիր գնդակ", "Կարմիր գնդակ։"),
        ("words", "كلب يجري", "كلب يجري."),
        ("words", "개가 달린다", "개가 달린다."),
        ("characters", "一只狗在跑", "一只狗在跑。"),
        ("characters", "穿着t恤的人拿着 iphone", "穿着t恤的人拿着 iphone。"),
        ("characters", "犬がボールー", "犬がボールー。"),
        ("characters", "หมาวิ่ง", "หมาวิ่ง"),
        ("characters", "ខ្មែរ", "ខ្មែរ។"),
        ("characters", "two dogs", "Two dogs."),
    ],
)
def test_sentences(tokenizer: str, text: str, expected: str) -> None:
    sentence = as_sentence(Caption(text, -1.0))
    assert sentence == Caption(expected, -1.0)
    assert as_sentence(sentence) == sentence
    tokenize = TOKENIZERS[tokenizer].tokenize
    assert tokenize(sentence.text) == tokenize(text), "it can be trained on"


def test_the_first_word_has_its_capital_too() -> None:
    words = (Word("a", 0.5), Word("man", 0.9), Word("'s", 1.0))
    sentence = as_sentence(Caption("a man's", -1.0, words))
    assert sentence.words == (Word("A", 0.5), *words[1:])
