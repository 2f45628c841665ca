"""``train_decoder.py --check``: can training start on these data, and what is doubtful about them?

Everything is read as training reads it; nothing is trained and nothing written. The report goes to
standard output line by line, so that what was found before an error is still seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from pipeline.caption_statistics import (
    Coverage,
    Spread,
    better_tokenizer,
    coverage,
    hardly_spaced,
    identical_files,
    repetitions,
)
from pipeline.captions import CaptionTable, read_captions
from pipeline.check_estimates import ROW_BYTES, extraction_seconds, training_cost
from pipeline.checkpoint import load_checkpoint
from pipeline.dataset import encode_captions, rows_of, tokenised
from pipeline.decoder_training import DecoderOptions
from pipeline.errors import UserError
from pipeline.features import DONE, FEATURE_SIZE, FeatureCache, partial_path
from pipeline.images import find_images
from pipeline.pretrained import PRETRAINED
from pipeline.search import SearchConfig
from pipeline.tokenizers import ENGLISH
from pipeline.training import refuse_other_settings
from pipeline.vocabulary import Vocabulary, tokenizer_of

SPLITS = ("train", "val", "test")
SHOWN = 3  # names of a kind
OTHER_COUNTS = (1, 2, 3, 5, 10)
# Below so many the advice is to start from the captioner in the box, and not to trust scores.
FEW_TRAIN, FEW_VAL = 2000, 100
# It must know so many percent of the words of captions.
KNOWN_ENOUGH = 90


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
    """Captions, joined with the pictures that can be trained on.

    Attributes:
        whole: all that the captions files have.
        table: the images with a picture, or with features where there is a cache.
        names: for each of these the picture's path below the data folder.
        on_disk: all pictures below the data folder.
        cache: the features, or None where they are still to be extracted.
    """

    whole: CaptionTable
    table: CaptionTable
    names: dict[str, str]
    on_disk: list[str]
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
    data = Path(options.data)
    checked = _read(options)
    _say_captions(checked.whole)
    _say_pictures(checked, data)
    table = checked.table
    if not table.images:
        raise UserError(f"{table.source}: none of its pictures is among those of --data {data}")
    sizes = Counter(image.split for image in table.images)
    none = f", {sizes[None]:,} in no split" if sizes[None] else ""
    per_split = ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS)
    click.echo(f"split: {per_split}{none} ({table.split_source})")
    groups = {s: tokenised(table.of_split(s), options.tokenizer) for s in ("train", "val")}
    for split, images in groups.items():
        if not images:
            what = "picture" if checked.cache is None else "picture with features"
            raise UserError(f"{table.source}: no {what} is in the {split} split")
    train = [words for group in groups["train"].values() for words in group]
    val = [words for group in groups["val"].values() for words in group]
    _say_lengths([*train, *val], options.tokenizer)
    vocabulary = Vocabulary.build(train, options.min_count, options.tokenizer)
    advice = _say_vocabulary(train, val, options.min_count)
    advice += _say_duplicates(checked, data)
    advice += _say_features(checked, options, commands)
    _say_run(options, run, table, checked.cache, force)
    captions = encode_captions(groups["train"].values(), vocabulary)
    pictures = len(groups["train"]) + len(groups["val"])
    in_memory = 2.0 * FEATURE_SIZE * pictures
    cost = training_cost(
        options,
        captions,
        len(vocabulary),
        len(groups["val"]),
        SearchConfig(max_length=vocabulary.tokenizer.longest),
        min(in_memory, memory),
        device,
    )
    where = "in memory" if in_memory <= memory else "read from the file (--feature-memory)"
    need = "" if cost.memory is None else f"{_size(cost.memory)} of memory, "
    click.echo(
        f"training: about {_duration(cost.epoch)} an epoch, {_duration(cost.total)} for "
        f"{options.epochs} epochs on {device.type} in {options.precision} "
        f"({cost.steps} steps timed)"
    )
    click.echo(
        f"  {need}features of {_size(in_memory)} {where}, {_size(cost.disk)} of disk in {run}"
    )
    advice += _advice(table, options, len(groups["train"]), len(groups["val"]), commands)
    for line in advice:
        click.echo(f"advice: {line}")
    if checked.cache is None:
        paths = [data / checked.names[image.name] for image in table.images]
        seconds = extraction_seconds(paths, len(checked.on_disk), device)
        click.echo(
            f"next: extract features, in about {_duration(seconds)} "
            f"({_size(ROW_BYTES * len(checked.on_disk))} of disk)\n  {commands.extract}\n"
            f"then:\n  {commands.train}"
        )
        return 1
    click.echo(f"next: training can start\n  {commands.train}")
    return 0


def _read(options: DecoderOptions) -> CheckedData:
    """Read captions, and join them with the features, or with the pictures where there are none."""
    data, features = Path(options.data), Path(options.features)
    table = read_captions(data, Path(options.captions) if options.captions else None)
    on_disk = find_images(data)
    cache = FeatureCache(features) if features.is_file() else None
    if cache is None and not on_disk:
        raise UserError(f"--data {data}: no pictures in this folder, and no features of them")
    available = on_disk if cache is None else cache.names(DONE)
    restricted, names = table.restrict(available)
    return CheckedData(table, restricted, names, on_disk, cache)


def _say_captions(table: CaptionTable) -> None:
    click.echo(f"captions: {table.source} ({table.layout})")
    counts = [len(image.captions) for image in table.images]
    spread = Spread.of(counts)
    click.echo(
        f"  {sum(counts):,} captions of {len(counts):,} images: {spread.median} an image in the "
        f"median, {spread.least} to {spread.most}"
    )
    for words, count in sorted(table.notes.items()):
        click.echo(f"  {words}: {count:,}")


def _say_pictures(checked: CheckedData, data: Path) -> None:
    """Compare the captions with the pictures of the folder, whatever features there are."""
    found, names = checked.whole.restrict(checked.on_disk)
    click.echo(
        f"pictures: {len(checked.on_disk):,} in {data}, {len(names):,} of them with captions"
    )
    missing = [image.name for image in checked.whole.images if image.name not in names]
    bare = sorted(set(checked.on_disk) - set(names.values()))
    for words, strangers in (
        ("captioned images without a picture, left out", missing),
        ("pictures without captions, left out", bare),
    ):
        if strangers:
            click.echo(f"  {words}: {len(strangers):,} ({_some(strangers)})")
    # Of the notes on matching, these two are said above, with names.
    for words, count in sorted((found.notes - checked.whole.notes).items()):
        if words.startswith(("images matched", "captioned images dropped because")):
            click.echo(f"  {words}: {count:,}")


def _say_lengths(captions: Sequence[Sequence[str]], tokenizer: str) -> None:
    chosen = tokenizer_of(tokenizer)
    spread = Spread.of(map(len, captions))
    click.echo(
        f"tokens ({tokenizer}): {spread.median} a caption in the median, {spread.high} at 95 %, "
        f"{spread.most} at most"
    )
    long = sum(len(words) > chosen.longest for words in captions)
    if long:
        click.echo(
            f"  {long:,} captions ({100 * long / len(captions):.1f} %) have more than the "
            f"{chosen.longest} tokens that a caption is given when pictures are captioned"
        )
    cut = sum(len(words) > chosen.longest_in_training for words in captions)
    if cut:
        click.echo(f"  {cut:,} are cut after {chosen.longest_in_training} tokens in training")


def _say_vocabulary(
    train: Sequence[Sequence[str]], val: Sequence[Sequence[str]], min_count: int
) -> list[str]:
    """Report which words val has that train has too rarely; returns advice."""
    counts = Counter(word for words in train for word in words)
    chosen = coverage(counts, val, min_count)
    click.echo(
        f"vocabulary: {chosen.known:,} words that train has {min_count} times or more "
        f"(--min-count), of {len(counts):,}"
    )
    if chosen.unknown:
        common = ", ".join(f"{word} {count}" for word, count in chosen.unknown.most_common(5))
        click.echo(
            f"  val has {chosen.unknown.total():,} other tokens ({chosen.percent:.1f} %) in "
            f"{chosen.touched:,} of its {chosen.captions:,} captions: {common}"
            f"{' ...' if len(chosen.unknown) > 5 else ''}"
        )
    else:
        click.echo("  val has no other words")
    others = [
        coverage(counts, val, count)
        for count in OTHER_COUNTS
        if count != min_count and any(n >= count for n in counts.values())
    ]
    rows = "; ".join(f"{c.min_count}: {c.known:,} words, {c.percent:.1f} %" for c in others)
    click.echo(f"  with another --min-count: {rows}")
    return _advice_on_min_count(chosen, others, len(train))


def _advice_on_min_count(chosen: Coverage, others: Sequence[Coverage], captions: int) -> list[str]:
    lower = [c for c in others if c.min_count < chosen.min_count and c.percent < chosen.percent]
    if chosen.percent > 3 and lower:
        # The highest count that leaves nearly as little unknown as the lowest does.
        least = min(c.percent for c in lower)
        enough = [c for c in lower if c.percent <= max(3.0, least + 1.0)]
        best = max(enough, key=lambda c: c.min_count)
        return [
            f"--min-count {best.min_count} leaves {best.percent:.1f} % of val's tokens unknown "
            f"instead of {chosen.percent:.1f} %"
        ]
    higher = [c for c in others if c.min_count == 2]
    if chosen.min_count == 1 and higher and captions > 1000 and higher[0].known < chosen.known:
        once = chosen.known - higher[0].known
        return [f"--min-count 2 leaves out {once:,} words seen once, which cannot be learned"]
    return []


def _say_duplicates(checked: CheckedData, data: Path) -> list[str]:
    """Report captions and pictures that come more than once; returns advice."""
    images = checked.table.images
    splits = {image.name: image.split for image in images}
    repeated = repetitions(images)
    paths = {name: data / path for name, path in checked.names.items()}
    groups, empty, all_compared = identical_files(paths)
    leaks = [g for g in groups if len({splits[name] for name in g if splits[name]}) > 1]
    lines, advice = [], []
    if repeated.within:
        lines.append(f"captions given twice to one image: {repeated.within:,}")
    if repeated.across:
        text, count = repeated.commonest
        lines.append(
            f"captions of several images: {repeated.across:,} (most often {_quoted(text)}, of "
            f"{count:,} images)"
        )
        if count > max(2, 0.05 * repeated.images):
            advice.append(
                f"{count:,} of {repeated.images:,} images share the caption {_quoted(text)}: "
                "the decoder will say it often; is it a placeholder?"
            )
    if groups:
        example = " = ".join(groups[0][:SHOWN])
        lines.append(f"pictures under several names: {len(groups):,} (such as {example})")
    if leaks:
        example = ", ".join(f"{name} ({splits[name] or 'no split'})" for name in leaks[0][:SHOWN])
        lines.append(f"  of these in two splits: {len(leaks):,} (such as {example})")
        advice.append(
            f"{len(leaks):,} pictures are in two splits under two names: scores will be too good; "
            "remove them from one"
        )
    if not all_compared:
        lines.append("not all pictures of equal size were compared: that would take too long")
    click.echo(f"duplicates: {'' if lines else 'none'}".rstrip())
    for line in lines:
        click.echo(f"  {line}")
    if empty:
        advice.append(f"{len(empty):,} pictures are empty files ({_some(empty)})")
    return advice


def _say_features(
    checked: CheckedData, options: DecoderOptions, commands: NextCommands
) -> list[str]:
    """Report what the cache has of the captioned pictures; returns advice."""
    path = Path(options.features)
    if checked.cache is None:
        begun = partial_path(path).is_file()
        click.echo(f"features: {path} is {'not finished' if begun else 'not there yet'}")
        return []
    cache = checked.cache
    identity = cache.identity
    used = [checked.names[image.name] for image in checked.table.images]
    rows_of(cache, used)  # raises where a row is damaged
    click.echo(
        f"features: {path}, of {len(used):,} captioned pictures ({identity.encoder} with "
        f"{Path(identity.weights_source).name}, {identity.precision}, {identity.engine})"
    )
    _, on_disk = checked.whole.restrict(checked.on_disk)
    failures = cache.failures()
    failed = sorted(set(on_disk.values()) & failures.keys())
    missing = sorted(set(on_disk.values()) - set(cache.names()))
    advice = []
    if failed:
        why = failures[failed[0]]
        click.echo(f"  could not be read, left out: {len(failed):,} ({failed[0]}: {why})")
    if missing:
        click.echo(f"  not extracted, left out: {len(missing):,} ({_some(missing)})")
        advice.append(f"extract the {len(missing):,} pictures that were added: {commands.extract}")
    if identity.weights_source == "random":
        advice.append("the features are of an untrained encoder: captions will be poor")
    return advice


def _say_run(
    options: DecoderOptions, run: Path, table: CaptionTable, cache: FeatureCache | None, force: bool
) -> None:
    """Report whether the run folder holds a run, which training would go on with."""
    last = run / "last.pt"
    if not last.is_file():
        return
    if force:
        click.echo(f"run: {run} is started over (--force)")
        return
    splits = {f"{split}_images": table.split_hash(split) for split in ("train", "val")}
    refuse_other_settings(run, {**asdict(options), **splits})
    saved = load_checkpoint(last)
    mismatch = None if cache is None else saved.encoder.mismatch(cache.identity)
    if mismatch:
        raise UserError(f"{options.features}: other features than {run} began with ({mismatch})")
    click.echo(f"run: {run} goes on after epoch {saved.epoch} of {options.epochs}")


def _advice(
    table: CaptionTable, options: DecoderOptions, train: int, val: int, commands: NextCommands
) -> list[str]:
    """Advise on the tokenizer and on small data."""
    advice = []
    better = better_tokenizer(table.images, options.tokenizer)
    unspaced = hardly_spaced(table.images)
    if better is not None:
        advice.append(f"--tokenizer {better[0]}: {better[1]}")
    elif unspaced is not None and options.tokenizer != "characters":
        advice.append(f"most captions have no space, such as {_quoted(unspaced)}: are they names?")
    if train < FEW_TRAIN:
        line = (
            f"{train:,} pictures to train on are few: captions will be monotonous and often wrong"
        )
        known = _known_to_pretrained(table) if options.tokenizer == ENGLISH else 0.0
        if better is None and known >= KNOWN_ENOUGH:
            line += (
                f"; the captioner in the box knows {known:.0f} % of your words, start from it: "
                f"{commands.finetune}"
            )
        advice.append(line)
    if val < FEW_VAL:
        advice.append(f"{val:,} val pictures are few: scores will depend on chance")
    return advice


def _known_to_pretrained(table: CaptionTable) -> float:
    """Tell the percentage of tokens that the captioner in the box has in its vocabulary."""
    try:
        vocabulary = load_checkpoint(Path(PRETRAINED)).vocabulary
    except UserError:
        return 0.0  # it is not there
    groups: Mapping[str, list[list[str]]] = tokenised(table.of_split("train"), ENGLISH)
    tokens = [token for group in groups.values() for words in group for token in words]
    return 100 * sum(token in vocabulary for token in tokens) / max(1, len(tokens))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _quoted(text: str) -> str:
    return f'"{text[:60]}{"..." if len(text) > 60 else ""}"'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 0.95e9 else f"{max(1, round(number / 1e6))} MB"
