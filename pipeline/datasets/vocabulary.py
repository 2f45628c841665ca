"""The vocabulary: the words that a decoder can read and write, by id.

>>> vocabulary = Vocabulary.build([["a", "dog"], ["a", "cat"]], min_count=2)
>>> vocabulary.words
('<pad>', '<start>', '<end>', '<unk>', 'a')
>>> vocabulary.encode(["a", "dog"])
[4, 3]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.datasets.tokenizers import ENGLISH, tokenizer_of
from pipeline.utils.errors import UserError

PAD, START, END, UNKNOWN = SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
PAD_ID, START_ID, END_ID, UNKNOWN_ID = range(4)


class Vocabulary:
    """The words that a decoder can read and write, by id, special tokens first; immutable.

    Raises:
        UserError: special tokens are missing or misplaced, an entry is not a string or
            empty, a word occurs twice, or there is no such tokenizer.
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
        """Build a vocabulary of the words that occur at least ``min_count`` times.

        ``token_lists`` holds the tokens of each training caption, made by ``tokenizer``. Words
        are sorted by descending count, then alphabetically. UserError if none is frequent enough.
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

    def tokenize(self, text: str) -> list[str]:
        """Split a caption into tokens, whether the vocabulary has them or not."""
        return self.tokenizer.tokenize(text)

    def detokenize(self, words: Iterable[str]) -> str:
        """Join tokens into a caption."""
        return self.tokenizer.detokenize(words)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Return the id of each token; that of ``<unk>`` for unknown and special tokens."""
        ids = (self._ids.get(token, UNKNOWN_ID) for token in tokens)
        return [number if number > UNKNOWN_ID else UNKNOWN_ID for number in ids]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words for ids up to the first <end>; <pad> and <start> are dropped.

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
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (self.words, self.tokenizer) == (other.words, other.tokenizer)


def _check_words(words: Sequence[str]) -> None:
    """Raise UserError if ``words`` is not a valid vocabulary, in order of id."""
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise UserError(f"a vocabulary is a list of words, not {type(words).__name__}")
    for number, word in enumerate(words):
        if not isinstance(word, str) or not word:
            raise UserError(f"entry {number} of the vocabulary is not a word: {word!r}")
    if tuple(words[: len(SPECIALS)]) != SPECIALS:
        raise UserError(
            f"the vocabulary must begin with {', '.join(SPECIALS)}, "
            f"but begins with {', '.join(words[: len(SPECIALS)]) or 'nothing'}"
        )
    twice = [word for word, count in Counter(words).items() if count > 1]
    if twice:
        raise UserError(f"the vocabulary holds a word twice: {twice[0]!r}")
