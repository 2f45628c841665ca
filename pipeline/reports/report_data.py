"""What a report tells of a run's data: splits, words, and the images that it shows."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.datasets.caption_readers import SPLITS
from pipeline.datasets.caption_table import CaptionTable, read_captions
from pipeline.datasets.encoded_captions import tokenized
from pipeline.datasets.image_sources import ImageSource, open_source
from pipeline.datasets.tar_shards import TarMember
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.cache import DONE, FeatureCache
from pipeline.utils.errors import UserError

Tokenised = Mapping[str, Sequence[Sequence[str]]]  # image name -> tokens of each caption

MOST_MISSED = 24  # words that a report lists


@dataclass(frozen=True)
class SplitFacts:
    """A split in numbers.

    Attributes:
        images, captions, words: how many.
        unknown_words: how many of ``words`` the vocabulary misses.
        unknown_captions: how many captions have such a word.
        lengths: mean, median and longest of the captions, in words.
    """

    images: int
    captions: int
    words: int
    unknown_words: int
    unknown_captions: int
    lengths: tuple[float, float, int]


@dataclass(frozen=True)
class ReportData:
    """The data of a run, as a report tells of it.

    Attributes:
        source: the captions file, its layout, and where the splits come from.
        notes: what was dropped or mended, in words, with how often.
        hashes: split to the hash of its list of images.
        splits: "train" and "val" in numbers.
        vocabulary: how many words it has, special tokens not counted.
        train_words: how many different words the training captions have.
        missed: words of val that the vocabulary misses, the most frequent first.
        references: captions by image name, as people wrote them.
        images: where the image of an image should be.
    """

    source: tuple[str, str, str]
    notes: Mapping[str, int]
    hashes: Mapping[str, str]
    splits: Mapping[str, SplitFacts]
    vocabulary: int
    train_words: int
    missed: Sequence[tuple[str, int]]
    references: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: Mapping[str, Path | TarMember] = field(default_factory=dict)


def describe_data(
    table: CaptionTable,
    source: ImageSource,
    names: Mapping[str, str],
    train: Tokenised,
    val: Tokenised,
    vocabulary: Vocabulary,
    shown: Iterable[str],
) -> ReportData:
    """Sum up the captions of a run.

    Args:
        table: the captions, of images that have an image.
        source: where the images are; of what is far away none is shown.
        names: image name -> name in ``source``.
        train, val: tokenised captions of the two splits.
        vocabulary: the run's.
        shown: images whose captions and images are to be kept.
    """
    kept = set(shown)
    counts = [_count(split) for split in (train, val)]
    missed = Counter({word: n for word, n in counts[1].items() if word not in vocabulary})
    return ReportData(
        source=(str(table.source), table.layout, table.split_source),
        notes=dict(table.notes),
        hashes={split: table.split_hash(split) for split in SPLITS if table.of_split(split)},
        splits={"train": _facts(train, vocabulary), "val": _facts(val, vocabulary)},
        vocabulary=len(vocabulary) - 4,
        train_words=len(counts[0]),
        missed=sorted(missed.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_MISSED],
        references={i.name: i.captions for i in table.images if i.name in kept},
        images=_images(source, {name: names[name] for name in kept & names.keys()}),
    )


def _images(source: ImageSource, names: Mapping[str, str]) -> dict[str, Path | TarMember]:
    """Find images to be shown: none where that would take long, or they are no longer there."""
    if not source.is_local:
        return {}
    try:
        return {name: source.image(path) for name, path in names.items()}
    except UserError:  # shards that are gone; features are enough to train on
        return {}


def _count(captions: Tokenised) -> Counter[str]:
    counts: Counter[str] = Counter()
    for group in captions.values():
        for words in group:
            counts.update(words)
    return counts


def _facts(captions: Tokenised, vocabulary: Vocabulary) -> SplitFacts:
    unknown = [
        sum(word not in vocabulary for word in words)
        for group in captions.values()
        for words in group
    ]
    lengths = [len(words) for group in captions.values() for words in group]
    return SplitFacts(
        images=len(captions),
        captions=len(lengths),
        words=sum(lengths),
        unknown_words=sum(unknown),
        unknown_captions=sum(map(bool, unknown)),
        lengths=(statistics.mean(lengths), statistics.median(lengths), max(lengths)),
    )


def read_data(
    settings: Mapping[str, Any], data: Path | None, vocabulary: Vocabulary
) -> tuple[ReportData, Tokenised]:
    """Read a run's captions again, and sum them up.

    Args:
        settings: the run's, from its config.json.
        data: the data folder, where it moved since the training.
        vocabulary: the run's.

    Returns:
        What a report tells of them, and the tokenised captions of val.

    Raises:
        UserError: they cannot be read, or are not those of the training.
    """
    source = open_source(data or settings["data"])
    captions = Path(settings["captions"]) if settings.get("captions") and data is None else None
    table = read_captions(source.captioned, captions)
    table, names = _restricted(table, source, Path(settings["features"]), settings)
    train, val = (
        tokenized(table.of_split(split), vocabulary.tokenizer.name) for split in ("train", "val")
    )
    if not train or not val:
        raise UserError(f"{table.source}: no captions of the images trained on")
    return describe_data(table, source, names, train, val, vocabulary, val), val


def _restricted(
    table: CaptionTable, source: ImageSource, features: Path, settings: Mapping[str, Any]
) -> tuple[CaptionTable, dict[str, str]]:
    """Keep the images that were trained with: those with features, or with images."""
    available: list[Sequence[str]] = []
    if features.is_file():
        available.append(FeatureCache(features).names(DONE))
    available.append(source.names)
    for names in available:
        kept, images = table.restrict(names)
        hashes = {f"{split}_images": kept.split_hash(split) for split in ("train", "val")}
        if all(settings.get(name, found) == found for name, found in hashes.items()):
            return kept, images
    raise UserError(f"{table.source}: not the captions and images that the run was trained with")
