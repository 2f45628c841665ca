"""Captions as token ids, grouped by image, and batches of similar length."""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.datasets.caption_table import (
    CaptionedImage,
    CaptionPaths,
    CaptionTable,
    read_captions,
)
from pipeline.datasets.image_sources import ImageSource
from pipeline.datasets.tokenizers import ENGLISH, tokenizer_of
from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, Vocabulary
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo


def load_table(
    source: ImageSource,
    captions: CaptionPaths,
    available: Sequence[str],
    encoding: str | None = None,
) -> tuple[CaptionTable, dict[str, str]]:
    """Read the captions of ``source``, keep those whose image is available, and print a summary.

    Returns the table and, for each of its images, the matching name in ``available``.

    Raises:
        UserError: no captions, or none of their images is available.
    """
    table, names = read_captions(source, captions, encoding).restrict(available)
    for line in table.summary():
        echo(line, err=True)
    if not table.images:
        raise UserError(
            f"{table.source}: none of its images is among those of --data {source.origin}"
        )
    return table, names


@dataclass
class EncodedCaptions:
    """Captions as token ids, concatenated in one array."""

    images: Tensor  # int64 (M,): the index of each caption's image; ascending
    tokens: Tensor  # int32: all captions concatenated, each <start> words <end>
    offsets: Tensor  # int64 (M + 1,): where each caption begins

    def __len__(self) -> int:
        return len(self.images)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens in each caption, including <start> and <end>: int64 (M,)."""
        return self.offsets[1:] - self.offsets[:-1]

    @functools.cached_property
    def first_of_image(self) -> Tensor:
        """Where each image's captions begin, and the last one's end: int64 (N + 1,)."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.images.bincount().cumsum(0)])

    def of_images(self, images: Tensor) -> EncodedCaptions:
        """Return the captions of ``images``, int64 (P,), with the images renumbered from 0."""
        bounds = self.first_of_image
        chosen = [torch.arange(int(bounds[p]), int(bounds[p + 1])) for p in images]
        captions = torch.cat(chosen)
        tokens = [self.tokens[self.offsets[c] : self.offsets[c + 1]] for c in captions]
        counts = torch.tensor([len(group) for group in chosen])
        return EncodedCaptions(
            torch.repeat_interleave(torch.arange(len(images)), counts),
            torch.cat(tokens),
            torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths[captions].cumsum(0)]),
        )

    def padded(self, indices: Tensor) -> Tensor:
        """Return captions as int64 (len(indices), longest), padded with ``<pad>``."""
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        columns = torch.arange(int(lengths.max()))
        inside = columns < lengths.unsqueeze(1)
        places = (starts.unsqueeze(1) + columns).masked_fill(~inside, 0)
        return self.tokens[places].long().masked_fill(~inside, PAD_ID)


def encode_captions(
    captions: Iterable[Sequence[Sequence[str]]], vocabulary: Vocabulary
) -> EncodedCaptions:
    """Encode tokenized captions, grouped by image; very long ones are truncated."""
    longest = vocabulary.tokenizer.longest_in_training
    tokens, offsets, counts = array("i"), [0], []
    for group in captions:
        counts.append(len(group))
        for words in group:
            tokens.extend([START_ID, *vocabulary.encode(words[:longest]), END_ID])
            offsets.append(len(tokens))
    return EncodedCaptions(
        torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)),
        torch.from_numpy(numpy.array(tokens, dtype=numpy.int32)),
        torch.tensor(offsets),
    )


def pad_captions(captions: Iterable[Sequence[int]]) -> Tensor:
    """Return captions of token ids as int64 (C, T), padded with ``<pad>``."""
    rows = [torch.tensor([*ids], dtype=torch.int64) for ids in captions]
    return pad_sequence(rows, batch_first=True, padding_value=PAD_ID)


def tokenized(
    images: Sequence[CaptionedImage], tokenizer: str = ENGLISH
) -> dict[str, list[list[str]]]:
    """Return each image's tokenized captions, by image name; those without words are dropped."""
    tokenize = tokenizer_of(tokenizer).tokenize
    groups = {
        # Interned, so that each word is stored once, however many millions of captions there are.
        image.name: [[*map(sys.intern, words)] for words in map(tokenize, image.captions) if words]
        for image in images
    }
    return {name: group for name, group in groups.items() if group}


def bucketed_batches(
    lengths: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Shuffle items, and batch those of similar length together to limit padding.

    Shuffled items are split into stretches of 50 batches. Each stretch is sorted by length and
    split into batches, which are shuffled. ``lengths`` is int64 (M,); yields indices, int64 (up to
    batch_size,), each once.
    """
    order = torch.randperm(len(lengths), generator=generator)
    for stretch in order.split(50 * batch_size):
        by_length = stretch[torch.argsort(lengths[stretch], stable=True)]
        batches = by_length.split(batch_size)
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]


def count_batches(items: int, batch_size: int) -> int:
    """Return the number of batches that ``bucketed_batches`` yields."""
    full, rest = divmod(items, 50 * batch_size)
    return full * 50 + -(-rest // batch_size)
