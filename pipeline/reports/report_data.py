"""The data of a run for its report: splits, vocabulary, and the images and references to show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.datasets.caption_collector import SPLITS
from pipeline.datasets.caption_table import CaptionTable, read_captions
from pipeline.datasets.encoded_captions import tokenized
from pipeline.datasets.image_sources import ImageSource, open_source
from pipeline.datasets.images import ImageRef
from pipeline.datasets.vocabulary import SPECIALS, Vocabulary
from pipeline.features.cache import DONE, FeatureCache
from pipeline.reports.caption_statistics import Coverage, coverage
from pipeline.training.run_folder import split_hashes
from pipeline.training.validation import Tokenized
from pipeline.utils.errors import UserError


@dataclass(frozen=True)
class SplitFacts:
    """A split in numbers."""

    images: int
    coverage: Coverage
    lengths: tuple[float, float, int]  # mean, median and maximum of the captions, in words


@dataclass(frozen=True)
class ReportData:
    """What a report shows of a run's data."""

    source: tuple[str, str, str]  # the captions file, its layout, where the splits come from
    notes: Mapping[str, int]  # what was dropped or repaired
    hashes: Mapping[str, str]  # of each split's list of images
    splits: Mapping[str, SplitFacts]  # train and val
    vocabulary: Vocabulary  # the run's
    train_words: int  # distinct words in the train captions
    val: Tokenized
    references: Mapping[str, Sequence[str]]  # the captions of val images, as written
    images: Mapping[str, ImageRef]  # the val images that are on this machine
    names: Mapping[str | int, str]  # of val images, by their ids in predictions.json

    @property
    def vocabulary_size(self) -> int:
        """Number of words in the vocabulary, without special tokens."""
        return len(self.vocabulary) - len(SPECIALS)


def read_data(
    settings: Mapping[str, Any], data: str | Path | None, vocabulary: Vocabulary
) -> ReportData:
    """Reread the captions of a run.

    Args:
        settings: the run's, from its config.json.
        data: the data folder, if it moved since the training.
        vocabulary: the run's.

    Raises:
        UserError: they cannot be read, or differ from those of the training.
    """
    source = open_source(data or settings["data"])
    own = data is None or str(data) == settings["data"]
    captions = settings["captions"] if own else None
    table = read_captions(source, captions, settings.get("encoding"))
    table, names = _used_in_training(table, source, Path(settings["features"]), settings)
    tokenizer = vocabulary.tokenizer.name
    train, val = (tokenized(table.of_split(split), tokenizer) for split in ("train", "val"))
    if not train or not val:
        raise UserError(f"{table.source}: no captions of the images trained on")
    return ReportData(
        source=(str(table.source), table.layout, table.split_source),
        notes=table.notes,
        hashes={split: table.split_hash(split) for split in SPLITS if table.of_split(split)},
        splits={"train": _facts(train, vocabulary), "val": _facts(val, vocabulary)},
        vocabulary=vocabulary,
        train_words=len({w for group in train.values() for words in group for w in words}),
        val=val,
        references={image.name: image.captions for image in table.of_split("val")},
        images=_images(source, {name: names[name] for name in val}),
        names={alias: name for name in val for alias in (name, table.image_id(name))},
    )


def _used_in_training(
    table: CaptionTable, source: ImageSource, features: Path, settings: Mapping[str, Any]
) -> tuple[CaptionTable, dict[str, str]]:
    """Keep the images that the run was trained on: those with features, or those that exist."""
    cached = [FeatureCache(features).names(DONE)] if features.is_file() else []
    for available in (*cached, source.names):
        kept, images = table.restrict(available)
        if split_hashes(kept).items() <= settings.items():
            return kept, images
    raise UserError(f"{table.source}: not the captions and images that the run was trained with")


def _images(source: ImageSource, names: Mapping[str, str]) -> dict[str, ImageRef]:
    """Find the image files; none if they are remote or gone."""
    if not source.is_local:
        return {}
    try:
        return {name: source.image(path) for name, path in names.items()}
    except UserError:  # tar shards that are gone; features are enough to train on
        return {}


def _facts(captions: Tokenized, vocabulary: Vocabulary) -> SplitFacts:
    flat = [words for group in captions.values() for words in group]
    lengths = [len(words) for words in flat]
    summary = (statistics.mean(lengths), statistics.median(lengths), max(lengths))
    return SplitFacts(len(captions), coverage(vocabulary, flat), summary)
