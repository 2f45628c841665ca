"""Statistics of captions: vocabulary coverage, repetitions, scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from pipeline.datasets.caption_table import CaptionedImage
from pipeline.datasets.tokenizers import CHARACTERS, ENGLISH, WORDS, unspaced_share

SCRIPT_SAMPLE = 20_000  # captions


@dataclass(frozen=True)
class Coverage:
    """How well a vocabulary covers some captions."""

    captions: int
    tokens: int
    affected: int  # captions with a token that the vocabulary lacks
    unknown: Counter[str]  # these tokens

    @property
    def percent(self) -> float:
        """Unknown tokens, in percent."""
        return 100 * self.unknown.total() / max(1, self.tokens)


def coverage(known: Container[str], captions: Sequence[Sequence[str]]) -> Coverage:
    """Count the tokens of tokenized captions that are not among the known words."""
    unknown = Counter(token for tokens in captions for token in tokens if token not in known)
    affected = sum(any(token in unknown for token in tokens) for tokens in captions)
    return Coverage(len(captions), sum(map(len, captions)), affected, unknown)


def most_shared(images: Sequence[CaptionedImage]) -> tuple[str, int]:
    """Return the caption that most images share, and how many do; there must be one."""
    owners = Counter(caption for image in images for caption in set(image.captions))
    return owners.most_common(1)[0]


def better_tokenizer(images: Sequence[CaptionedImage], chosen: str) -> tuple[str, str] | None:
    """Return the tokenizer that suits the captions better, and why; None if ``chosen`` is fine."""
    texts = [caption for image in images for caption in image.captions]
    joined = "".join(texts[:: max(1, len(texts) // SCRIPT_SAMPLE)])
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


def unspaced_example(images: Sequence[CaptionedImage]) -> str | None:
    """Return a long caption without a space if most captions are like that."""
    texts = [caption for image in images for caption in image.captions]
    unspaced = [text for text in texts if len(text) > 12 and " " not in text]
    return unspaced[0] if len(unspaced) > 0.5 * len(texts) else None
