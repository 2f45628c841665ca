"""Tokenizers for languages other than English, and what all tokenizers have in common.

>>> words_of("Zwei Mädchen fahren U-Bahn, in der Straße!")
['zwei', 'mädchen', 'fahren', 'u-bahn', 'in', 'der', 'straße']
>>> characters_of("一只狗在草地上跑，穿着T恤。")
['一', '只', '狗', '在', '草', '地', '上', '跑', '穿', '着', 't', '恤']
>>> join_characters(["两", "个", "人", "在", "london", "bridge", "上"])
'两个人在london bridge上'

``vocabulary`` has the English one, and lists all by name. Whatever a tokenizer makes,
its own detokenizer writes so that tokenizing gives the same tokens again. No token holds a space,
"<" or ">", so no caption can contain a special token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

ENGLISH, WORDS, CHARACTERS = "english", "words", "characters"

# Inside a word these belong to it: "l'eau", "U-Bahn", Catalan "col·lecció", Hebrew "צה״ל", and the
# joiners of Persian and of India's scripts, which have no width.
_INSIDE = "'\\-·׳״\u200c\u200d"
_APOSTROPHES = "`´‘’‛ʼ′＇"
_HYPHENS = "\u2010\u2011"
_NUMBER_SIGNS = ".,:"  # kept in "3.5", "1,000" and "10:30"

# Scripts that are written without spaces between words: Han, kana, bopomofo, Hangul, and Thai, Lao,
# Burmese and Khmer but for their digits.
UNSPACED = (
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00016fe0-\U00016fe4\U0001b000-\U0001b16f\U00020000-\U000323af"
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"
    "\u0e01-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"
    "\u1000-\u103f\u104c-\u108f\u109a-\u109d\u1780-\u17d3\u17d7\u17dc\u17dd"
)

_LETTER = r"[^\W_]"  # or digit
# After cleaning all that is left are letters, digits, marks, the signs above and spaces.
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


@dataclass(frozen=True)
class Tokenizer:
    """How captions become tokens and tokens a caption.

    Attributes:
        name: what ``--tokenizer`` calls it.
        description: of its tokens, for tables of scores.
        tokenize: splits any text into tokens, maybe none.
        detokenize: writes tokens as a caption.
        longest: most tokens in a caption that is searched.
        longest_in_training: tokens after which a training caption is cut; the longest of Flickr8k
            has 37.
    """

    name: str
    description: str
    tokenize: Callable[[str], list[str]]
    detokenize: Callable[[Iterable[str]], str]
    longest: int = 20
    longest_in_training: int = 50


class CharacterTable(dict[int, str]):
    """What ``str.translate`` makes of a character, worked out when it first occurs."""

    def __init__(self, clean: Callable[[str], str]) -> None:
        super().__init__()
        self._clean = clean

    def __missing__(self, code: int) -> str:
        self[code] = replacement = self._clean(chr(code))
        return replacement


def _clean_character(character: str) -> str:
    """Return what stands for one character: itself, a plain form, a space or nothing."""
    category = unicodedata.category(character)
    if character in _APOSTROPHES:
        return "'"
    if character in _HYPHENS:
        return "-"
    if character in "'-·׳״\u200c\u200d" or character in _NUMBER_SIGNS:
        return character
    if character == "\u200b":  # the zero-width space of Thai and Khmer ends a word
        return " "
    variation = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    if category in ("Cf", "Cs", "Co", "Cn", "Me") or variation:
        return ""
    return character if category[0] in "LMN" else " "


_CHARACTERS = CharacterTable(_clean_character)


def _clean(text: str) -> str:
    """Bring a text to NFC, in lower case, with spaces for all punctuation.

    Lower case, unlike case folding, keeps "ß".
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    return unicodedata.normalize("NFC", text.translate(_CHARACTERS))


def words_of(text: str) -> list[str]:
    """Split a caption in any language that puts spaces between words, in lower case.

    The text is brought to Unicode form NFC, so that letters with diacritics (Vietnamese "ế") are
    one character. Punctuation and symbols are dropped; apostrophes and hyphens inside a word stay.
    """
    return _WORD.findall(_clean(text))


def join_words(tokens: Iterable[str]) -> str:
    """Join words with spaces."""
    return " ".join(tokens)


def characters_of(text: str) -> list[str]:
    """Split a caption in a language without spaces: a character a token, in lower case.

    Words of other scripts and numbers within it stay whole. Full-width letters and digits become
    the plain ones, half-width kana the usual ones. A vowel or tone sign stays with its character
    (Thai). Korean, which has spaces, loses them: for it ``words_of`` is better.
    """
    # Only there: NFKC of a whole text would take Thai letters apart.
    text = _OTHER_WIDTH.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    return _CHARACTER_OR_WORD.findall(_clean(text))


def join_characters(tokens: Iterable[str]) -> str:
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
    """Tell the share, 0 to 1, of letters that are of scripts without spaces, Hangul apart."""
    letters = [character for character in text if character.isalpha()]
    unspaced = sum(
        _UNSPACED_CHARACTER.match(character) is not None and not "\uac00" <= character <= "\ud7a3"
        for character in letters
    )
    return unspaced / max(1, len(letters))
