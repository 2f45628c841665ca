"""Tests of the tokenizer and the vocabulary. All captions here are made up."""

from __future__ import annotations

import csv
import random
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import REPOSITORY, SHARED

from pipeline.datasets import vocabulary as module
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
    detokenize,
    tokenize,
)
from pipeline.utils.errors import UserError

FLICKR8K = SHARED / "flickr8k" / "captions.txt"


def flickr8k_captions() -> list[str]:
    with FLICKR8K.open(encoding="utf-8", newline="") as file:
        return [row["caption"] for row in csv.DictReader(file)]


# Each expectation but those marked is what Stanford's PTBTokenizer, wrapped by
# pycocoevalcap 1.2, makes of the caption; test_agrees_with_stanford repeats it.
LIKE_STANFORD = {
    "A juggler throws three balls .": "a juggler throws three balls",
    "A kite flies . It is red .": "a kite flies it is red",
    "A kite flies. It is red.": "a kite flies it is red",
    "a kite flies. it is red": "a kite flies it is red",
    "a goat.Its horns": "a goat.its horns",
    "Dr. Fox waits for Mrs. Hen on Long St. in the U.S.": (
        "dr. fox waits for mrs. hen on long st. in the u.s."
    ),
    "tea at 5 p.m. in the U.S. pavilion": "tea at 5 p.m. in the u.s. pavilion",
    "J. Fox and A.B. Hen": "j. fox and a.b. hen",
    "toys, cups, etc.": "toys cups etc.",
    "they sit in the sun.": "they sit in the sun",
    "the fox's den, the foxes' dens": "the fox 's den the foxes dens",
    "she can't, won't and doesn't; I'm sure you're fine": (
        "she ca n't wo n't and does n't i 'm sure you 're fine"
    ),
    "this one is the fox's.": "this one is the fox 's",
    "they'll say we've won, he'd not": "they 'll say we 've won he 'd not",
    "a cannot and a gonna": "a can not and a gon na",
    "a sign says \"stop\" and 'go'": "a sign says stop and go",
    "“stop” and ‘go’, it’s red": "stop and go it 's red",
    "'slippery' tiles": "slippery tiles",
    "rock 'n' roll, rock 'n roll": "rock 'n' roll rock 'n roll",
    "give 'em a cup": "give 'em a cup",
    "a '90s car of the 1990s": "a '90s car of the 1990s",
    "five o'clock tea": "five o'clock tea",
    "a black-and-white t-shirt": "a black-and-white t-shirt",
    "a fox - a red one - runs": "a fox a red one runs",
    "a fox -- a red one -- runs": "a fox a red one runs",
    "a fox–a red one—runs": "a fox a red one runs",
    "a fox- and a -hen": "a fox and a hen",
    "wait... a fox.. runs…": "wait a fox runs",
    "a fox;a hen:a duck,a goose": "a fox a hen a duck a goose",
    "What? A fox!": "what a fox",
    "1,000 cups at 10:30, 3.5 miles, 1/2 full": "1,000 cups at 10:30 3.5 miles 1/2 full",
    "it costs $5.50 & 20% off": "it costs $ 5.50 & 20 % off",
    "#5 wins": "# 5 wins",
    "red/white flags": "red/white flags",
    "one+one = two": "one + one = two",
    "a café, naïve": "a café naïve",
}
NOT_LIKE_STANFORD = {
    "a (red) [blue] {green} kite": "a red blue green kite",  # Stanford: -lrb- and so on
    "the <end> of <unk>": "the end of unk",  # Stanford: one token each
    "wow!! really?!": "wow really",  # Stanford: "!!" and "?!"
    "a * and a | and a ~": "a and a and a",
    "a red 😀 kite ™": "a red kite",
    "M&M's": "m & m 's",
}


@pytest.mark.parametrize("caption", [*LIKE_STANFORD, *NOT_LIKE_STANFORD])
def test_tokens(caption: str) -> None:
    assert tokenize(caption) == {**LIKE_STANFORD, **NOT_LIKE_STANFORD}[caption].split()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        (" \t\n", []),
        ("...", []),
        ("' '' \" - -- / . , :", []),
        ("a\tred\nkite\x00flies\x85high\u2028up", ["a", "red", "kite", "flies", "high", "up"]),
        ("k\u200bi\u00adte\ufeff", ["kite"]),  # zero-width space, soft hyphen, byte order mark
        ("cafe\u0301", ["caf\u00e9"]),  # decomposed
        ("e\u200d\u0301", ["\u00e9"]),  # composed only when the joiner is gone
        ("kite\ud800", ["kite"]),  # a lone surrogate
        ("\u0130STANBUL", ["i\u0307stanbul"]),
        ("x \u2764\ufe0f y", ["x", "y"]),
        ("non\u2011stop it\u02bcs", ["non-stop", "it", "'s"]),
        ("3\ufe0f kites", ["3", "kites"]),  # variation selector
        ("a fox.,hens,5:cups", ["a", "fox", "hens", "5", "cups"]),
        ("$$", ["$", "$"]),
        (".5 .kite", [".5", "kite"]),
    ],
)
def test_unusual_text(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@pytest.mark.parametrize("piece", ["a ", "'", ".", "a", "n't", "a.", "x's", "&", "\u0301", "-a"])
def test_long_text_is_quick_and_reversible(piece: str) -> None:
    start = time.perf_counter()
    tokens = tokenize(piece * 50_000)
    assert tokenize(detokenize(tokens)) == tokens
    assert time.perf_counter() - start < 10  # 0.1 here; what grows quadratically takes minutes
    assert max(map(len, tokens), default=0) <= module.LONGEST_WORD


@pytest.mark.parametrize(
    ("tokens", "caption"),
    [
        ("a fox 's den", "a fox's den"),
        ("she does n't and ca n't", "she doesn't and can't"),
        ("you could n't 've known", "you couldn't've known"),
        ("i 'm sure they 'll say we 've won", "i'm sure they'll say we've won"),
        ("a fox can not gon na", "a fox cannot gonna"),
        ("$ 5 and 20 % for # 1", "$5 and 20% for #1"),
        ("dogs & cats", "dogs & cats"),
        ("rock 'n roll in the u.s.", "rock 'n roll in the u.s."),
        ("'s n't", "'s n't"),
        ("", ""),
    ],
)
def test_detokenize(tokens: str, caption: str) -> None:
    assert detokenize(tokens.split()) == caption
    assert tokenize(caption) == tokens.split()


@pytest.mark.parametrize("caption", [*LIKE_STANFORD, *NOT_LIKE_STANFORD])
def test_tokens_survive_detokenize(caption: str) -> None:
    tokens = tokenize(caption)
    assert tokenize(detokenize(tokens)) == tokens
    assert tokenize(" ".join(tokens)) == tokens


def test_any_text_survives_detokenize() -> None:
    pieces = [*"abnstdlemr.',-:/&$%#@+=\"`()<>?!059", "'s", "n't", "'ll", " ", ". ", "é", "e\u0301"]
    pieces += ["\u200b", "\ud800", "İ", "Σ", "…", "’", "–", "😀", "\x00", "½", "कि", "\u0301"]
    pieces += ["cannot", "gonna", "u.s.", "mr.", "<end>", "<unk>", "-lrb-"]
    draw = random.Random(0)
    for _ in range(10_000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 14)))
        tokens = tokenize(text)
        assert tokenize(detokenize(tokens)) == tokens, repr(text)
        assert not any(set("<>()\" '") & {token[0], token[-1]} - {"'"} for token in tokens)


@pytest.mark.shared("flickr8k/captions.txt")
def test_all_flickr8k_captions_survive_detokenize() -> None:
    captions = flickr8k_captions()
    different = sum(tokenize(detokenize(tokens := tokenize(text))) != tokens for text in captions)
    assert len(captions) > 30_000
    assert different == 0


@pytest.mark.slow
@pytest.mark.shared("flickr8k/captions.txt")
def test_agrees_with_stanford() -> None:
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    stanford = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    captions = [*LIKE_STANFORD, *flickr8k_captions()]
    try:
        answers: dict[int, list[str]] = stanford.tokenize(
            {number: [{"caption": caption}] for number, caption in enumerate(captions)}
        )
    except PermissionError:
        pytest.skip("pycocoevalcap writes into its own folder, which is read-only")
    same = [tokenize(caption) == answers[i][0].split() for i, caption in enumerate(captions)]
    made_up, flickr8k = same[: len(LIKE_STANFORD)], same[len(LIKE_STANFORD) :]
    assert all(made_up)
    # All but 7 of 35,455: six with brackets, which COCO keeps, and one odd word.
    assert sum(flickr8k) >= 0.9998 * len(flickr8k)


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'nltk', 'regex'}"
    code = f"import sys, pipeline.datasets.vocabulary; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_build_sorts_by_count_then_alphabet() -> None:
    captions = [["b", "a", "c"], ["b", "c", "a"], ["b", "rare"]]
    vocabulary = Vocabulary.build(iter(captions), min_count=2)
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


def test_special_ids() -> None:
    assert SPECIALS == ("<pad>", "<start>", "<end>", "<unk>")
    assert (PAD_ID, START_ID, END_ID, UNKNOWN_ID) == (0, 1, 2, 3)
    vocabulary = Vocabulary.build([["kite"]], min_count=1)
    assert vocabulary.words.index(END) == END_ID
    assert vocabulary.words.index(UNKNOWN) == UNKNOWN_ID


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
    captions = [tokenize(f"a {special} kite{special}") for _ in range(5)]
    assert captions[0] == ["a", special[1:-1], "kite", special[1:-1]]
    vocabulary = Vocabulary.build(captions)
    assert vocabulary.words[:4] == SPECIALS
    assert all(number > UNKNOWN_ID for number in vocabulary.encode(captions[0]))
    # Nor can tokens that did not come from tokenize.
    assert Vocabulary.build([[special, "kite"]] * 5).words == (*SPECIALS, "kite")
    assert vocabulary.encode([special]) == [UNKNOWN_ID]


def test_list_round_trip() -> None:
    vocabulary = Vocabulary.build([["a", "kite", "n't", "é"]], min_count=1)
    again = Vocabulary.from_list(vocabulary.to_list())
    assert again == vocabulary and hash(again) == hash(vocabulary)
    assert again.encode(["kite", "é"]) == vocabulary.encode(["kite", "é"])
    vocabulary.to_list().append("changed")
    assert len(vocabulary) == 8


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
        Vocabulary.from_list(words)
