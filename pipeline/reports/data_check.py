"""``train_decoder.py --check``: can training start on these data, and what is doubtful about them?

Everything is read as training reads it; nothing is trained and nothing written. The report goes to
standard output line by line, so that what was found before an error is still seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline.datasets.caption_table import CaptionTable, read_captions
from pipeline.datasets.encoded_captions import encode_captions, tokenized
from pipeline.datasets.image_sources import ImageSource, open_source
from pipeline.datasets.tokenizers import CHARACTERS, ENGLISH
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.options import SearchConfig
from pipeline.features.cache import DONE, FeatureCache, partial_path
from pipeline.features.feature_set import rows_of
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.models.pretrained import PRETRAINED
from pipeline.reports.caption_statistics import better_tokenizer, hardly_spaced
from pipeline.reports.cost_estimate import ROW_BYTES, extraction_seconds, training_cost
from pipeline.reports.data_report import (
    duration,
    quoted,
    say_captions,
    say_duplicates,
    say_lengths,
    say_vocabulary,
    size,
    some,
)
from pipeline.training.decoder_stage import DecoderOptions
from pipeline.training.run_folder import refuse_other_settings
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo

SPLITS = ("train", "val", "test")
# Below so many the advice is to start from the captioner in the box, and not to trust scores.
FEW_TRAIN, FEW_VAL = 2000, 100
# It must know so many percent of the words of captions.
KNOWN_ENOUGH = 90

Captions = dict[str, list[list[str]]]  # image name -> tokens of each caption


@dataclass(frozen=True)
class NextCommands:
    """Commands for the user to go on with, written out.

    Attributes:
        train: the present one without ``--check``.
        extract: makes the features that it needs.
        finetune: starts from the captioner in the box instead.
    """

    train: str
    extract: str
    finetune: str


@dataclass
class CheckedData:
    """Captions, joined with the images that can be trained on.

    Attributes:
        whole: all that the captions files have.
        table: the images with an image, or with features where there is a cache.
        names: for each of these the image's name in the source.
        source: where the images are.
        cache: the features, or None where they are still to be extracted.
    """

    whole: CaptionTable
    table: CaptionTable
    names: dict[str, str]
    source: ImageSource
    cache: FeatureCache | None


def check_data(
    options: DecoderOptions,
    run: Path,
    device: torch.device,
    memory: float,
    force: bool,
    commands: NextCommands,
) -> int:
    """Report on the data that ``options`` name, and on what training will take.

    Args:
        options: as for training.
        run: the run folder, which is only read.
        device: where to train.
        memory: bytes that features may take.
        force: whether a run in the folder is to be started over.
        commands: how to go on.

    Returns:
        The exit code: 0 if training can start, 1 if features have to be extracted first.

    Raises:
        UserError: training cannot start; one line that says why.
    """
    checked = _read(options)
    advice: list[str] = []
    try:
        train, val, vocabulary = _check_captions(checked, options, commands, advice)
        _say_run(options, run, checked, force)
        _say_cost(options, run, (train, val), vocabulary, memory, device)
        advice += _advice_on_size(checked.table, options, len(train), len(val), commands)
    finally:
        for line in advice:  # it may tell how to mend what is wrong
            echo(f"advice: {line}")
    if checked.cache is not None:
        echo(f"next: training can start\n  {commands.train}")
        return 0
    count = len(checked.source.names)
    images = [checked.source.image(name) for name in checked.names.values()]
    seconds = extraction_seconds(images, count, device)
    echo(
        f"next: extract features, in about {duration(seconds)} "
        f"({size(ROW_BYTES * count)} of disk)\n  {commands.extract}\n"
        f"then:\n  {commands.train}"
    )
    return 1


def _check_captions(
    checked: CheckedData, options: DecoderOptions, commands: NextCommands, advice: list[str]
) -> tuple[Captions, Captions, Vocabulary]:
    """Report on captions, images and features; returns the captions of train and val.

    Raises:
        UserError: training cannot start.
    """
    table = checked.table
    say_captions(checked.whole)
    _say_images(checked, options.data)
    if not table.images:
        raise UserError(
            f"{table.source}: none of its images is among those of --data {options.data}"
        )
    sizes = Counter(image.split for image in table.images)
    none = f", {sizes[None]:,} in no split" if sizes[None] else ""
    per_split = ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS)
    echo(f"split: {per_split}{none} ({table.split_source})")
    advice += _advice_on_tokenizer(table, options.tokenizer)
    train = tokenized(table.of_split("train"), options.tokenizer)
    val = tokenized(table.of_split("val"), options.tokenizer)
    for split, images in (("train", train), ("val", val)):
        if not images:
            what = "image" if checked.cache is None else "image with features"
            raise UserError(f"{table.source}: no {what} is in the {split} split")
    train_captions = [words for group in train.values() for words in group]
    val_captions = [words for group in val.values() for words in group]
    say_lengths([*train_captions, *val_captions], options.tokenizer)
    vocabulary = Vocabulary.build(train_captions, options.min_count, options.tokenizer)
    advice += say_vocabulary(train_captions, val_captions, options.min_count)
    photos = {name: checked.source.image(path) for name, path in checked.names.items()}
    files = {name: photo for name, photo in photos.items() if isinstance(photo, Path)}
    advice += say_duplicates(table.images, files)
    advice += _say_features(checked, options, commands)
    return train, val, vocabulary


def _read(options: DecoderOptions) -> CheckedData:
    """Read captions, and join them with the features, or with the images where there are none."""
    source, features = open_source(options.data), Path(options.features)
    captions = Path(options.captions) if options.captions else None
    table = read_captions(source.captioned, captions)
    cache = FeatureCache(features) if features.is_file() else None
    if cache is None and not source.names:
        raise UserError(f"--data {options.data}: no images there, and no features of them")
    available = source.names if cache is None else cache.names(DONE)
    restricted, names = table.restrict(available)
    return CheckedData(table, restricted, names, source, cache)


def _say_images(checked: CheckedData, data: str) -> None:
    """Compare the captions with the images of the folder, whatever features there are."""
    on_disk = checked.source.names
    if not on_disk:
        echo(f"images: none in {data}, which training does not need: there are features")
        return
    found, names = checked.whole.restrict(on_disk)
    echo(f"images: {len(on_disk):,} in {data}, {len(names):,} of them with captions")
    here = names.keys() | checked.names.keys()  # one may be gone since it was extracted
    missing = [image.name for image in checked.whole.images if image.name not in here]
    bare = sorted(set(on_disk) - set(names.values()))
    for words, strangers in (
        ("captioned images without an image, left out", missing),
        ("images without captions, left out", bare),
    ):
        if strangers:
            echo(f"  {words}: {len(strangers):,} ({some(strangers)})")
    # Of the notes on matching, these two are said above, with names.
    for words, count in sorted((found.notes - checked.whole.notes).items()):
        if words.startswith(("images matched", "captioned images dropped because")):
            echo(f"  {words}: {count:,}")


def _say_features(
    checked: CheckedData, options: DecoderOptions, commands: NextCommands
) -> list[str]:
    """Report what the cache has of the captioned images; returns advice."""
    path = Path(options.features)
    if checked.cache is None:
        begun = partial_path(path).is_file()
        echo(f"features: {path} is {'not finished' if begun else 'not there yet'}")
        return []
    cache = checked.cache
    identity = cache.identity
    used = [checked.names[image.name] for image in checked.table.images]
    rows_of(cache, used)  # raises where a row is damaged
    echo(
        f"features: {path}, of {len(used):,} captioned images ({identity.encoder} with "
        f"{Path(identity.weights_source).name}, {identity.precision}, {identity.engine})"
    )
    _, here = checked.whole.restrict(checked.source.names)
    failures = cache.failures()
    failed = sorted(set(here.values()) & failures.keys())
    missing = sorted(set(here.values()) - set(cache.names()))
    advice = []
    if failed:
        why = failures[failed[0]]
        echo(f"  could not be read, left out: {len(failed):,} ({failed[0]}: {why})")
    if missing:
        echo(f"  not extracted, left out: {len(missing):,} ({some(missing)})")
        advice.append(f"extract the {len(missing):,} images that were added: {commands.extract}")
    if identity.weights_source == "random":
        advice.append("the features are of an untrained encoder: captions will be poor")
    return advice


def _say_run(options: DecoderOptions, run: Path, checked: CheckedData, force: bool) -> None:
    """Report whether the run folder holds a run, which training would go on with."""
    last = run / "last.pt"
    if not last.is_file():
        return
    if force:
        echo(f"run: {run} is started over (--force)")
        return
    splits = {f"{split}_images": checked.table.split_hash(split) for split in ("train", "val")}
    refuse_other_settings(run, {**asdict(options), **splits})
    saved = load_checkpoint(last)
    cache = checked.cache
    mismatch = None if cache is None else saved.encoder.mismatch(cache.identity)
    if mismatch:
        raise UserError(f"{options.features}: other features than {run} began with ({mismatch})")
    echo(f"run: {run} goes on after epoch {saved.epoch} of {options.epochs}")


def _say_cost(
    options: DecoderOptions,
    run: Path,
    splits: tuple[Captions, Captions],
    vocabulary: Vocabulary,
    memory: float,
    device: torch.device,
) -> None:
    """Report what training will take."""
    train, val = splits
    in_memory = 2.0 * FEATURE_SIZE * (len(train) + len(val))
    cost = training_cost(
        options,
        encode_captions(train.values(), vocabulary),
        len(vocabulary),
        len(val),
        SearchConfig(max_length=vocabulary.tokenizer.longest),
        min(in_memory, memory),
        device,
    )
    echo(
        f"training: about {duration(cost.epoch)} an epoch, {duration(cost.total)} for "
        f"{options.epochs} epochs on {device.type} in {options.precision} "
        f"({cost.steps} steps timed)"
    )
    where = "in memory" if in_memory <= memory else "read from the file (--feature-memory)"
    need = "" if cost.memory is None else f"{size(cost.memory)} of memory, "
    echo(f"  {need}features of {size(in_memory)} {where}, {size(cost.disk)} of disk in {run}")


def _advice_on_tokenizer(table: CaptionTable, chosen: str) -> list[str]:
    better = better_tokenizer(table.images, chosen)
    if better is not None:
        return [f"--tokenizer {better[0]}: {better[1]}"]
    unspaced = hardly_spaced(table.images)
    if unspaced is not None and chosen != CHARACTERS:
        return [f"most captions have no space, such as {quoted(unspaced)}: are they file names?"]
    return []


def _advice_on_size(
    table: CaptionTable, options: DecoderOptions, train: int, val: int, commands: NextCommands
) -> list[str]:
    advice = []
    if train < FEW_TRAIN:
        line = f"{train:,} images to train on are few: many captions will be alike or wrong"
        english = options.tokenizer == ENGLISH
        known = _known_to_pretrained(table) if english else 0.0
        if known >= KNOWN_ENOUGH:
            line += (
                f"; the captioner in the box knows {known:.0f} % of their words, start from it: "
                f"{commands.finetune}"
            )
        advice.append(line)
    if val < FEW_VAL:
        advice.append(f"{val:,} val images are few: scores will depend on chance")
    return advice


def _known_to_pretrained(table: CaptionTable) -> float:
    """Tell the percentage of tokens that the captioner in the box has in its vocabulary."""
    try:
        vocabulary = load_checkpoint(Path(PRETRAINED)).vocabulary
    except UserError:
        return 0.0  # it is not there
    groups = tokenized(table.of_split("train"), ENGLISH)
    tokens = [token for group in groups.values() for words in group for token in words]
    return 100 * sum(token in vocabulary for token in tokens) / max(1, len(tokens))
