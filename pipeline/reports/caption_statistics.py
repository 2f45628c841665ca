"""What captions are like: lengths, words that val has and train lacks, repetitions, scripts."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.caption_table import CaptionedImage
from pipeline.datasets.tokenizers import CHARACTERS, ENGLISH, WORDS, unspaced_share
from pipeline.datasets.vocabulary import SPECIALS

# More bytes of images are not read to find doubles.
MOST_HASHED = 4e9
# Captions looked at to tell the script.
MOST_LOOKED_AT = 20_000


@dataclass(frozen=True)
class Spread:
    """The median, the 95th percentile, the least and the greatest of some numbers."""

    median: int
    high: int
    least: int
    most: int

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Spread:
        """Sum up at least one number."""
        ordered = sorted(numbers)
        last = len(ordered) - 1
        return cls(ordered[last // 2], ordered[round(0.95 * last)], ordered[0], ordered[last])


@dataclass(frozen=True)
class Coverage:
    """How well the words of train cover val.

    Attributes:
        min_count: how often a word must come in train to be known.
        known: how many words are, special tokens apart.
        tokens, captions: how many there are in val.
        unknown: tokens of val that are not known, with their counts.
        touched: captions of val with such a token.
    """

    min_count: int
    known: int
    tokens: int
    captions: int
    unknown: Counter[str]
    touched: int

    @property
    def percent(self) -> float:
        """Unknown tokens among those of val."""
        return 100 * self.unknown.total() / max(1, self.tokens)


def coverage(counts: Mapping[str, int], val: Sequence[Sequence[str]], min_count: int) -> Coverage:
    """Tell which tokens of val captions are too rare in train, where words have ``counts``."""
    known = {word for word, count in counts.items() if count >= min_count} - set(SPECIALS)
    unknown: Counter[str] = Counter()
    touched = 0
    for tokens in val:
        strange = [token for token in tokens if token not in known]
        unknown.update(strange)
        touched += bool(strange)
    return Coverage(min_count, len(known), sum(map(len, val)), len(val), unknown, touched)


@dataclass(frozen=True)
class Repetitions:
    """Captions that come more than once.

    Attributes:
        within: captions beyond the first of their text with one image.
        across: texts that several images have.
        commonest: the text that most images have, and how many do.
        images: how many images there are.
    """

    within: int
    across: int
    commonest: tuple[str, int]
    images: int


def repetitions(images: Sequence[CaptionedImage]) -> Repetitions:
    """Count equal captions, of one image and of several."""
    owners: Counter[str] = Counter()
    within = 0
    for image in images:
        own = set(image.captions)
        within += len(image.captions) - len(own)
        owners.update(own)
    return Repetitions(
        within,
        sum(count > 1 for count in owners.values()),
        owners.most_common(1)[0] if owners else ("", 0),
        len(images),
    )


def identical_files(paths: Mapping[str, Path]) -> tuple[list[list[str]], list[str], bool]:
    """Find files with equal content.

    Only files of one size are read and compared, by their hash.

    Args:
        paths: a name for each file.

    Returns:
        The names of equal files, group by group; the names of empty files; and whether all were
        compared, which is not so where that would take reading more than 4 GB.
    """
    by_size: defaultdict[int, list[str]] = defaultdict(list)
    for name, path in paths.items():
        if path.is_file():
            by_size[path.stat().st_size].append(name)
    empty = by_size.pop(0, [])
    shared = {size: names for size, names in by_size.items() if len(names) > 1}
    groups: list[list[str]] = []
    left = MOST_HASHED
    for size, names in sorted(shared.items()):
        left -= size * len(names)
        if left < 0:
            return groups, empty, False
        by_hash: defaultdict[bytes, list[str]] = defaultdict(list)
        for name in names:
            try:
                content = paths[name].read_bytes()
            except OSError:
                continue  # extraction will say so
            by_hash[hashlib.blake2b(content).digest()].append(name)
        groups += [same for same in by_hash.values() if len(same) > 1]
    return sorted(groups), empty, True


def better_tokenizer(images: Sequence[CaptionedImage], chosen: str) -> tuple[str, str] | None:
    """Tell which tokenizer would suit captions better than the chosen one, and why, or None."""
    texts = [caption for image in images for caption in image.captions]
    texts = texts[:: max(1, len(texts) // MOST_LOOKED_AT)]
    joined = "".join(texts)
    letters = sum(map(str.isalpha, joined))
    if not letters:
        return None
    unspaced = unspaced_share(joined)
    if unspaced > 0.3:
        why = f"{100 * unspaced:.0f} % of the letters are of scripts without spaces"
        return None if chosen == CHARACTERS else (CHARACTERS, why)
    foreign = sum(character.isalpha() and not character.isascii() for character in joined) / letters
    best = WORDS if foreign > 0.005 else ENGLISH
    if chosen == CHARACTERS and unspaced < 0.05:
        return best, f"only {100 * unspaced:.1f} % of the letters are of scripts without spaces"
    if chosen == ENGLISH and best == WORDS:
        return WORDS, f"{100 * foreign:.1f} % of the letters are not those of English"
    return None


def hardly_spaced(images: Sequence[CaptionedImage]) -> str | None:
    """Give a caption of many letters without a space, if most captions are so."""
    texts = [caption for image in images for caption in image.captions]
    unspaced = [text for text in texts if len(text) > 12 and " " not in text]
    return unspaced[0] if len(unspaced) > 0.5 * len(texts) else None
