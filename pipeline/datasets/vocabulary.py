"""Words: the English tokenizer, all tokenizers by name, and the vocabulary.

>>> tokenize("A man's dog sits on St. Mark's Square. He doesn't move!")
['a', 'man', "'s", 'dog', 'sits', 'on', 'st.', 'mark', "'s", 'square', 'he', 'does', "n't", 'move']
>>> detokenize(["a", "man", "'s", "dog", "does", "n't", "move"])
"a man's dog doesn't move"
>>> vocabulary = Vocabulary.build([["a", "dog"], ["a", "cat"]], min_count=2)
>>> vocabulary.words
('<pad>', '<start>', '<end>', '<unk>', 'a')
>>> vocabulary.encode(["a", "dog"])
[4, 3]
>>> Vocabulary.build([["一", "只", "狗"]], 1, "characters").tokenize("一只狗。")
['一', '只', '狗']

A model's tokens come from the tokenizer that its vocabulary names. English tokens follow the Penn
Treebank, in lower case and without punctuation, as the COCO caption evaluation has them from
Stanford's PTBTokenizer, but without Java. nltk splits each word, and needs no downloaded corpus for
it. On the 35,455 captions of Flickr8k's train and dev splits the two agree on all but 7. They
differ on purpose here:

* brackets are punctuation (COCO means to drop them, but keeps "-lrb-");
* "<" and ">" are brackets, so that no caption can contain a special token;
* a token without a letter or digit is dropped unless it is one of & $ % # @ + = (COCO
  also keeps "*", "?!" and the like).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from pipeline.datasets.tokenizers import (
    CHARACTERS,
    ENGLISH,
    WORDS,
    CharacterTable,
    Tokenizer,
    characters_of,
    join_characters,
    join_words,
    words_of,
)
from pipeline.utils.errors import UserError

PAD, START, END, UNKNOWN = SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
PAD_ID, START_ID, END_ID, UNKNOWN_ID = range(4)

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
# What detokenize writes on to the word before.
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
# The look behind keeps time linear: a long run inside a word is tried once, from its start.
_EDGES = re.compile(r"^(?:['/-]|\.(?!\d))+|(?<!['/-])['/-]+$")
_EQUATION_SIGN = re.compile(r"[+=]")


def _clean_character(character: str) -> str:
    """Return what stands for one character: itself, a plain form, a space or nothing."""
    category = unicodedata.category(character)
    if character in "`´‘’‛ʼ′＇":
        return "'"
    if character in "\u2010\u2011":  # hyphen and non-breaking hyphen
        return "-"
    if character == "…":
        return ". "
    if category in ("Cf", "Cs", "Co", "Cn") or "\ufe00" <= character <= "\ufe0f":
        return ""  # zero-width, lone surrogates, unassigned codes, variation selectors
    if category[0] in "LMN" or category == "Sc" or character in SYMBOLS or character in "'-.,:/":
        return character
    return " "


_CHARACTERS = CharacterTable(_clean_character)


@lru_cache(maxsize=1)
def _treebank_tokenizer() -> Any:
    """Return nltk's tokenizer, which is the same in all its versions.

    NLTKWordTokenizer is not: "5'9" is one token or two, depending on the version. nltk
    is imported here and not above, because that takes a quarter of a second.
    """
    from nltk.tokenize.treebank import TreebankWordTokenizer

    return TreebankWordTokenizer()


@lru_cache(maxsize=1 << 16)
def _split_word(word: str) -> tuple[str, ...]:
    """Split a cleaned, lower-case word without spaces into its tokens.

    Each token is split again until nothing changes, so that ``_split_word(token)`` is
    ``(token,)`` for every token: this is what makes ``detokenize`` reversible.
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
        # One word at a time, so that a period within the text comes off like the last one.
        parts = _treebank_tokenizer().tokenize(word)
    if parts == [word]:
        return (word,)
    return tuple(token for part in parts for token in _split_word(part))


def tokenize(text: str) -> list[str]:
    """Split a caption into lower-case Penn Treebank tokens without punctuation.

    The text is brought to Unicode form NFC; typographic quotes and hyphens become plain
    ones; control characters separate words and zero-width characters vanish. Any string
    is accepted, and one without words gives an empty list.
    """
    text = unicodedata.normalize("NFC", text).translate(_CHARACTERS)
    text = unicodedata.normalize("NFC", text.lower())
    text = _COMMA_OUTSIDE_NUMBER.sub(" ", text)
    text = _STRAY_PERIODS.sub(" ", text)
    text = _EQUATION_SIGN.sub(r" \g<0> ", text)
    return [token for word in text.split() for token in _split_word(word)]


def detokenize(tokens: Iterable[str]) -> str:
    """Join tokens into a readable caption, the reverse of ``tokenize``.

    Two tokens are written together only where ``tokenize`` takes them apart again, so
    ``tokenize(detokenize(tokens)) == tokens`` for all tokens that ``tokenize`` made.
    """
    written: list[tuple[str, ...]] = []  # the tokens of each written word
    for token in tokens:
        if written and _belongs_to(written[-1], token):
            written[-1] += (token,)
        else:
            written.append((token,))
    return " ".join("".join(parts) for parts in written)


def _belongs_to(parts: tuple[str, ...], token: str) -> bool:
    """Tell whether a token is written on to the word that ``parts`` make up."""
    last = parts[-1]
    amount = last in ("#", "$") and token[:1].isdecimal()
    if not (token in ATTACHED or (last, token) in CONTRACTED or amount):
        return False
    return tokenize("".join(parts) + token) == [*parts, token]


TOKENIZERS = {
    tokenizer.name: tokenizer
    for tokenizer in (
        Tokenizer(ENGLISH, "PTB-style tokens, lower case, no punctuation", tokenize, detokenize),
        Tokenizer(WORDS, "words, lower case, no punctuation", words_of, join_words),
        Tokenizer(
            CHARACTERS,
            "characters, and words of scripts with spaces, lower case, no punctuation",
            *(characters_of, join_characters),
            # A word of Chinese or Japanese has two characters, more or less.
            longest=40,
            longest_in_training=100,
        ),
    )
}


def tokenizer_of(name: str) -> Tokenizer:
    """Find a tokenizer by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokenizer {name!r}; there are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


class Vocabulary:
    """The words a decoder can read and write, each with an id; it never changes.

    The special tokens ``<pad>``, ``<start>``, ``<end>`` and ``<unk>`` have ids 0 to 3.
    Make one with ``Vocabulary.build`` from the captions of the train split alone, or
    with ``Vocabulary.from_list`` from a checkpoint. ``words`` is the tuple of all words
    by id, special tokens first; ``tokenizer`` is what makes them of captions.
    """

    def __init__(self, words: Sequence[str], tokenizer: str = ENGLISH) -> None:
        _check_words(words)
        self.words = tuple(words)
        self.tokenizer = tokenizer_of(tokenizer)
        self._ids = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def build(
        cls,
        token_lists: Iterable[Sequence[str]],
        min_count: int = 5,
        tokenizer: str = ENGLISH,
    ) -> Vocabulary:
        """Make a vocabulary of the words that occur ``min_count`` times or more.

        ``token_lists`` holds the tokens of each caption, made by ``tokenizer``. Words are
        sorted by count, the most frequent first, and alphabetically where counts are equal.
        Raises UserError if no word is frequent enough.
        """
        counts = Counter(token for tokens in token_lists for token in tokens)
        for special in SPECIALS:
            del counts[special]
        frequent = [word for word, count in counts.items() if count >= min_count]
        if not frequent:
            highest = max(counts.values(), default=0)
            raise UserError(
                f"no word occurs {min_count} times or more in the captions for training "
                f"(the most frequent occurs {highest} times); choose a lower --min-count"
            )
        frequent.sort(key=lambda word: (-counts[word], word))
        return cls((*SPECIALS, *frequent), tokenizer)

    @classmethod
    def from_list(cls, words: Sequence[str], tokenizer: str = ENGLISH) -> Vocabulary:
        """Rebuild a vocabulary from what ``to_list`` gave, and its tokenizer's name.

        Raises UserError if the list cannot be one: special tokens missing or not in
        their places, an entry that is no string or empty, or a word that occurs twice;
        or if there is no such tokenizer.
        """
        return cls(words, tokenizer)

    def to_list(self) -> list[str]:
        """Return the words by id, special tokens first, for the checkpoint."""
        return list(self.words)

    def tokenize(self, text: str) -> list[str]:
        """Split a caption into tokens, whether the vocabulary has them or not."""
        return self.tokenizer.tokenize(text)

    def detokenize(self, words: Iterable[str]) -> str:
        """Write tokens as a caption."""
        return self.tokenizer.detokenize(words)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Return the id of each token, that of ``<unk>`` for an unknown word.

        No start or end is added. The text of a special token counts as an unknown word.
        """
        ids = (self._ids.get(token, UNKNOWN_ID) for token in tokens)
        return [number if number > UNKNOWN_ID else UNKNOWN_ID for number in ids]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words for ids up to the first end; padding and starts are dropped.

        ``<unk>`` stays where the ids hold it. Ids may be Python or numpy integers.
        Raises IndexError for an id outside the vocabulary.
        """
        tokens = []
        for number in ids:
            if number == END_ID:
                break
            if number < 0:
                raise IndexError(f"negative word id {number}")
            if number not in (PAD_ID, START_ID):
                tokens.append(self.words[number])
        return tokens

    def __len__(self) -> int:
        """Return the number of words, special tokens among them."""
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        """Tell whether the vocabulary has this word."""
        return word in self._ids

    def __eq__(self, other: object) -> bool:
        """Tell whether both have the same words with the same ids, and one tokenizer."""
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (self.words, self.tokenizer) == (other.words, other.tokenizer)

    def __hash__(self) -> int:
        """Equal vocabularies have equal hashes."""
        return hash((self.words, self.tokenizer.name))


def _check_words(words: Sequence[str]) -> None:
    """Raise UserError if ``words`` cannot be the words of a vocabulary, by id."""
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise UserError(f"a vocabulary is a list of words, not {type(words).__name__}")
    for number, word in enumerate(words):
        if not isinstance(word, str) or not word:
            raise UserError(f"entry {number} of the vocabulary is no word: {word!r}")
    if tuple(words[: len(SPECIALS)]) != SPECIALS:
        raise UserError(
            f"the vocabulary must begin with {', '.join(SPECIALS)}, "
            f"but begins with {', '.join(words[: len(SPECIALS)]) or 'nothing'}"
        )
    twice = [word for word, count in Counter(words).items() if count > 1]
    if twice:
        raise UserError(f"the vocabulary holds a word twice: {twice[0]!r}")
