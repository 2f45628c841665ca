"""Three tokenizers, each with the detokenizer that reverses it.

>>> tokenize_english("A man's dog sits on St. Mark's Square. He doesn't move!")
['a', 'man', "'s", 'dog', 'sits', 'on', 'st.', 'mark', "'s", 'square', 'he', 'does', "n't", 'move']
>>> detokenize_english(["a", "man", "'s", "dog", "does", "n't", "move"])
"a man's dog doesn't move"
>>> tokenize_words("Zwei Mädchen fahren U-Bahn, in der Straße!")
['zwei', 'mädchen', 'fahren', 'u-bahn', 'in', 'der', 'straße']
>>> tokenize_characters("一只狗在草地上跑，穿着T恤。")
['一', '只', '狗', '在', '草', '地', '上', '跑', '穿', '着', 't', '恤']

Tokenizing a detokenizer's output gives the same tokens again. No token contains a space, "<" or
">", so no caption can contain a special token.

English tokens follow the Penn Treebank, in lower case and without punctuation, like those of
Stanford's PTBTokenizer in the COCO caption evaluation; on the 35,455 captions of Flickr8k's train
and dev splits the two differ on 7. Here brackets, "<" and ">" are punctuation, and a token without
a letter or digit is dropped unless it is one of & $ % # @ + =.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.utils.errors import UserError

ENGLISH, WORDS, CHARACTERS = "english", "words", "characters"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its detokenizer."""

    name: str  # in ``--tokenizer``
    description: str  # of its tokens, for tables of scores
    tokenize: Callable[[str], list[str]]
    detokenize: Callable[[Iterable[str]], str]
    longest: int = 20  # longest caption that search produces, in tokens
    longest_in_training: int = 50  # training captions are cut here; Flickr8k's longest has 37


class _CharacterTable(dict[int, str]):
    """For ``str.translate``: a character is kept, or becomes a plain form, a space or nothing."""

    def __init__(self, kept: str, currency: bool, special: dict[str, str]) -> None:
        super().__init__()
        self._kept, self._currency = kept, currency
        self._special = (
            dict.fromkeys("`´‘’‛ʼ′＇", "'") | dict.fromkeys("\u2010\u2011", "-") | special
        )

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        variation = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
        if character in self._special:
            replacement = self._special[character]
        elif character in self._kept or (category == "Sc" and self._currency):
            replacement = character
        elif category in ("Cf", "Cs", "Co", "Cn", "Me") or variation:
            replacement = ""  # zero-width, lone surrogates, unassigned codes, keycaps
        else:
            replacement = character if category[0] in "LMN" else " "
        self[code] = replacement
        return replacement


# English

SYMBOLS = frozenset("&$%#@+=")  # tokens although they hold no letter or digit

# Words that keep their final period wherever they stand, as in Stanford's tokenizer.
# Abbreviations that are also everyday words ("in.", "sat.", "no.", "ill.") are not among
# them: in a caption such a period nearly always ends the sentence.
_ABBREVIATIONS = """
    mr mrs ms messrs dr prof rev hon jr sr esq mme mlle msgr
    adm capt cmdr col gen gov lt maj pres rep sen sgt
    ave bldg blvd ct ft mt rd sq st
    assn bros co corp dept inc ltd plc univ
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn fla ga ind kan ky md mich minn mo mont neb nev okla penn
    tenn va vt wis wyo
    al cf est etc ext ph ph.d tel vs
"""
ABBREVIATIONS = frozenset(f"{word}." for word in _ABBREVIATIONS.split())
APOSTROPHE_WORDS = frozenset(("'s", "'m", "'d", "'re", "'ve", "'ll", "'n", "'n'", "'em"))
# Tokens that detokenizing joins to the word before.
ATTACHED = frozenset(("'s", "'m", "'d", "'re", "'ve", "'ll", "n't", "%"))
CONTRACTED = frozenset(
    (("can", "not"), ("gim", "me"), ("gon", "na"), ("got", "ta"), ("lem", "me"), ("wan", "na"))
)

# Real words are shorter. nltk takes quadratic time on some strings and, from 3.10 on,
# raises TimeoutError, so anything longer is cut.
LONGEST_WORD = 200

_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")  # "j." and "u.s."
_DECADE = re.compile(r"'\d\ds?")  # "'90s"
_COMMA_OUTSIDE_NUMBER = re.compile(r"(?<!\d)[,:]|[,:](?!\d)")  # not in "1,000" and "10:30"
_STRAY_PERIODS = re.compile(r"(?<!\w)\.(?!\d)|\.(?=\.)|-{2,}")  # not in ".5"; "..." leaves one
# The lookbehind keeps matching linear: a long run inside a word is tried once, from its start.
_EDGES = re.compile(r"^(?:['/-]|\.(?!\d))+|(?<!['/-])['/-]+$")
_EQUATION_SIGN = re.compile(r"[+=]")
_ENGLISH_CHARACTERS = _CharacterTable("'-.,:/" + "".join(SYMBOLS), True, {"…": ". "})


@lru_cache(maxsize=1)
def _treebank_tokenizer() -> Any:
    # NLTKWordTokenizer splits "5'9" in one version and not in another. The import takes 0.25 s.
    from nltk.tokenize.treebank import TreebankWordTokenizer

    return TreebankWordTokenizer()


@lru_cache(maxsize=1 << 16)
def _split_word(word: str) -> tuple[str, ...]:
    """Split a cleaned, lower-case word into its tokens.

    Each token is split again until nothing changes: this is what makes ``detokenize`` reversible.
    """
    if word in SYMBOLS or word in APOSTROPHE_WORDS or _DECADE.fullmatch(word):
        return (word,)
    stripped = _EDGES.sub("", word)
    if stripped != word:
        return _split_word(stripped)
    if not any(character.isalnum() for character in word):
        # A run of symbols ("$$") still holds tokens; other marks hold none.
        return tuple(character for character in word if character in SYMBOLS)
    if len(word) > LONGEST_WORD:
        parts = [word[i : i + LONGEST_WORD] for i in range(0, len(word), LONGEST_WORD)]
    elif word in ABBREVIATIONS or _INITIALS.fullmatch(word):
        return (word,)
    else:
        # One word at a time, so that a period within the text is split off like the last one.
        parts = _treebank_tokenizer().tokenize(word)
    if parts == [word]:
        return (word,)
    return tuple(token for part in parts for token in _split_word(part))


def tokenize_english(text: str) -> list[str]:
    """Split any text into lower-case Penn Treebank tokens without punctuation, possibly none.

    The text is normalized to NFC; typographic quotes and hyphens become plain ones; control
    characters separate words and zero-width characters vanish.
    """
    text = unicodedata.normalize("NFC", text).translate(_ENGLISH_CHARACTERS)
    text = unicodedata.normalize("NFC", text.lower())
    text = _COMMA_OUTSIDE_NUMBER.sub(" ", text)
    text = _STRAY_PERIODS.sub(" ", text)
    text = _EQUATION_SIGN.sub(r" \g<0> ", text)
    return [token for word in text.split() for token in _split_word(word)]


def detokenize_english(tokens: Iterable[str]) -> str:
    """Join tokens into a readable caption; ``tokenize_english`` splits it into the same again."""
    written: list[tuple[str, ...]] = []  # the tokens of each written word
    for token in tokens:
        if written and _belongs_to(written[-1], token):
            written[-1] += (token,)
        else:
            written.append((token,))
    return " ".join("".join(parts) for parts in written)


def _belongs_to(parts: tuple[str, ...], token: str) -> bool:
    """True if a token is joined to the word that ``parts`` make up, and can be split off again."""
    last = parts[-1]
    amount = last in ("#", "$") and token[:1].isdecimal()
    if not (token in ATTACHED or (last, token) in CONTRACTED or amount):
        return False
    return tokenize_english("".join(parts) + token) == [*parts, token]


# Other languages

# Kept inside a word: "l'eau", "U-Bahn", Catalan "col·lecció", Hebrew "צה״ל", and the
# zero-width joiners of Persian and Indic scripts.
_INSIDE = "'\\-·׳״\u200c\u200d"
_NUMBER_SIGNS = ".,:"  # kept in "3.5", "1,000" and "10:30"

# Scripts written without spaces between words: Han, kana, bopomofo, Hangul, and Thai, Lao, Burmese
# and Khmer except for their digits.
UNSPACED = (
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00016fe0-\U00016fe4\U0001b000-\U0001b16f\U00020000-\U000323af"
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"
    "\u0e01-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"
    "\u1000-\u103f\u104c-\u108f\u109a-\u109d\u1780-\u17d3\u17d7\u17dc\u17dd"
)

_LETTER = r"[^\W_]"  # or digit
# After cleaning, only letters, digits, marks, the signs above and spaces are left.
_ANY = rf"[^\s{_INSIDE}{_NUMBER_SIGNS}]"
_MARK = rf"[^\w\s{_INSIDE}{_NUMBER_SIGNS}]"
_BETWEEN = rf"(?:[{_INSIDE}]|(?<=\d)[{_NUMBER_SIGNS}](?=\d))"
_WORD = re.compile(rf"{_LETTER}{_ANY}*(?:{_BETWEEN}{_ANY}+)*")
_SPACED = rf"(?:(?![{UNSPACED}]){_ANY})"
_CHARACTER_OR_WORD = re.compile(
    rf"(?={_LETTER})[{UNSPACED}]{_MARK}*|(?![{UNSPACED}]){_LETTER}{_SPACED}*(?:{_BETWEEN}{_SPACED}+)*"
)
_UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
_OTHER_WIDTH = re.compile("[\uff01-\uffee]+")
# The zero-width space of Thai and Khmer ends a word.
_CHARACTERS = _CharacterTable("'-·׳״\u200c\u200d.,:", False, {"\u200b": " "})


def _clean(text: str) -> str:
    """Normalize a text to NFC and lower case (keeping "ß"); punctuation becomes spaces."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    return unicodedata.normalize("NFC", text.translate(_CHARACTERS))


def tokenize_words(text: str) -> list[str]:
    """Split a caption in any language that puts spaces between words, in lower case.

    The text is normalized to NFC, so that letters with diacritics (Vietnamese "ế") are
    one character. Punctuation and symbols are dropped; apostrophes and hyphens inside a word stay.
    """
    return _WORD.findall(_clean(text))


def tokenize_characters(text: str) -> list[str]:
    """Split a caption in a language without spaces: one token per character, in lower case.

    Numbers and words in other scripts stay whole. Full-width letters and digits, and half-width
    kana, become the usual ones. A vowel or tone sign stays with its character (Thai). Korean loses
    its spaces: ``tokenize_words`` is better for it.
    """
    # Only there: NFKC of the whole text would decompose Thai letters.
    text = _OTHER_WIDTH.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    return _CHARACTER_OR_WORD.findall(_clean(text))


def detokenize_characters(tokens: Iterable[str]) -> str:
    """Join tokens, with a space only between two words of scripts that have spaces."""
    written: list[str] = []
    spaced = False
    for token in tokens:
        spaces = _UNSPACED_CHARACTER.match(token) is None
        if spaced and spaces:
            written.append(" ")
        written.append(token)
        spaced = spaces
    return "".join(written)


def unspaced_share(text: str) -> float:
    """Return the fraction of letters in scripts without spaces, Hangul excluded."""
    letters = [character for character in text if character.isalpha()]
    unspaced = sum(
        _UNSPACED_CHARACTER.match(character) is not None and not "\uac00" <= character <= "\ud7a3"
        for character in letters
    )
    return unspaced / max(1, len(letters))


TOKENIZERS = {
    ENGLISH: Tokenizer(
        ENGLISH,
        "PTB-style tokens, lower case, no punctuation",
        tokenize_english,
        detokenize_english,
    ),
    WORDS: Tokenizer(WORDS, "words, lower case, no punctuation", tokenize_words, " ".join),
    CHARACTERS: Tokenizer(
        CHARACTERS,
        "characters, and words of scripts with spaces, lower case, no punctuation",
        tokenize_characters,
        detokenize_characters,
        # A Chinese or Japanese word has about two characters.
        longest=40,
        longest_in_training=100,
    ),
}


def tokenizer_of(name: str) -> Tokenizer:
    """Return a tokenizer by its name; UserError if there is none."""
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokenizer {name!r}; there are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]
