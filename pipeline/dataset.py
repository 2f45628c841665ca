"""Captions joined with the rows of a feature cache, as numbers to train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy
import torch
from torch import Tensor

from pipeline.captions import CaptionedImage, CaptionTable, read_captions
from pipeline.errors import UserError
from pipeline.features import FeatureCache
from pipeline.vocabulary import END_ID, PAD_ID, START_ID, Vocabulary, tokenize

# Words after which a training caption is cut; the longest of Flickr8k has 37.
LONGEST_CAPTION = 50


def load_table(
    data: Path, captions: Path | None, available: Sequence[str]
) -> tuple[CaptionTable, dict[str, str]]:
    """Read the captions of ``data``, keep those whose picture is available, and say aloud
    what was found.

    Returns:
        The table, and for each of its images the name among ``available``.

    Raises:
        UserError: no captions, or none of their pictures is available.
    """
    table, names = read_captions(data, captions).restrict(available)
    for line in table.summary():
        click.echo(line, err=True)
    if not table.images:
        raise UserError(f"{table.source}: none of its pictures is among those of --data {data}")
    return table, names


def rows_of(cache: FeatureCache, names: Sequence[str]) -> Tensor:
    """Find the rows of pictures, which must be there and whole: int64 (len(names),).

    Raises:
        KeyError: a name is not in the cache.
        UserError: one of these rows is damaged.
    """
    rows = cache.rows(names)
    if (rows < 0).any():
        raise KeyError(names[int((rows < 0).argmax())])
    damaged = cache.damaged_rows(rows)
    if len(damaged):
        raise UserError(
            f"{cache.path}: {len(damaged)} rows are damaged (that of {cache.name(damaged[0])}, for "
            "one); extract_features.py makes them again"
        )
    return torch.from_numpy(rows)


@dataclass
class EncodedCaptions:
    """Captions as token ids, one after the other in one array, whatever their number.

    Attributes:
        rows: int64 (M,): the picture of each caption, as a row of the cache or an index.
        tokens: int32: all captions behind each other, each <start> words <end>.
        offsets: int64 (M + 1,): where each caption begins.
    """

    rows: Tensor
    tokens: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """Tokens in each caption, <start> and <end> included: int64 (M,)."""
        return self.offsets[1:] - self.offsets[:-1]

    def padded(self, indices: Tensor) -> Tensor:
        """Collect captions into int64 (len(indices), longest), padded with ``<pad>``."""
        starts, lengths = self.offsets[indices], self.lengths[indices]
        columns = torch.arange(int(lengths.max()))
        inside = columns < lengths.unsqueeze(1)
        places = (starts.unsqueeze(1) + columns).masked_fill(~inside, 0)
        return self.tokens[places].long().masked_fill(~inside, PAD_ID)


def encode_captions(
    captions: Iterable[Sequence[Sequence[str]]], rows: Tensor, vocabulary: Vocabulary
) -> EncodedCaptions:
    """Turn tokenised captions, grouped by image, into numbers; ``rows[i]`` is for group i."""
    tokens: list[numpy.ndarray] = []
    counts = []
    for group in captions:
        counts.append(len(group))
        for words in group:
            ids = [START_ID, *vocabulary.encode(words[:LONGEST_CAPTION]), END_ID]
            tokens.append(numpy.array(ids, dtype=numpy.int32))
    offsets = numpy.zeros(len(tokens) + 1, dtype=numpy.int64)
    numpy.cumsum([len(ids) for ids in tokens], out=offsets[1:])
    flat = numpy.concatenate(tokens) if tokens else numpy.empty(0, dtype=numpy.int32)
    return EncodedCaptions(
        torch.repeat_interleave(rows, torch.tensor(counts)),
        torch.from_numpy(flat),
        torch.from_numpy(offsets),
    )


def tokenised(images: Sequence[CaptionedImage]) -> dict[str, list[list[str]]]:
    """Tokenise all captions of each image, by the image's name.

    Captions without any word are left out, and images without any caption then left.
    """
    groups = {i.name: [words for words in map(tokenize, i.captions) if words] for i in images}
    return {name: group for name, group in groups.items() if group}


def bucketed_batches(
    lengths: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Shuffle, and batch items of like length together so that little is padded.

    Items are shuffled, cut into stretches of 50 batches, sorted by length inside a stretch,
    cut into batches, and the batches of a stretch shuffled. Every item comes once.

    Args:
        lengths: int64 (M,).
        batch_size: items a batch.
        generator: the source of the order.

    Yields:
        Indices, int64 (up to batch_size,).
    """
    order = torch.randperm(len(lengths), generator=generator)
    for stretch in order.split(50 * batch_size):
        by_length = stretch[torch.argsort(lengths[stretch], stable=True)]
        batches = by_length.split(batch_size)
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]


def count_batches(items: int, batch_size: int) -> int:
    """Say how many batches ``bucketed_batches`` gives."""
    full, rest = divmod(items, 50 * batch_size)
    return full * 50 + -(-rest // batch_size)


def feature_statistics(
    cache: FeatureCache, rows: Tensor, sample: int = 20_000
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of features over ``rows``, float32 (2048,) each.

    Of more than ``sample`` rows an evenly spaced sample is taken.
    """
    chosen = rows[:: max(1, len(rows) // sample)].numpy()
    total = numpy.zeros(cache.features.shape[1])
    squares = numpy.zeros_like(total)
    for start in range(0, len(chosen), 4096):
        values = cache.read(chosen[start : start + 4096]).astype(numpy.float64)
        total += values.sum(0)
        squares += (values**2).sum(0)
    mean = total / len(chosen)
    deviation = numpy.sqrt(numpy.maximum(squares / len(chosen) - mean**2, 0.0))
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()
