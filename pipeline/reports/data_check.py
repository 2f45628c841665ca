"""``train_decoder.py --check``: report whether training can start, and what is doubtful.

Everything is read as training reads it; nothing is trained or written. The report is printed line
by line, so that what was found before an error is still shown.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.datasets.caption_readers import SPLITS
from pipeline.datasets.caption_table import CaptionTable, read_captions
from pipeline.datasets.encoded_captions import tokenized
from pipeline.datasets.image_sources import ImageSource, open_source
from pipeline.datasets.tokenizers import CHARACTERS, ENGLISH, tokenizer_of
from pipeline.datasets.vocabulary import SPECIALS, Vocabulary
from pipeline.features.cache import DONE, FeatureCache, partial_path
from pipeline.features.feature_set import rows_of
from pipeline.models.checkpoint import LAST, load_checkpoint
from pipeline.models.pretrained import PRETRAINED
from pipeline.reports.caption_statistics import (
    better_tokenizer,
    coverage,
    most_shared,
    unspaced_example,
)
from pipeline.training.options import DecoderOptions
from pipeline.training.run_folder import RESUME, refuse_other_settings, split_hashes
from pipeline.training.validation import split_captions
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo

# With fewer images the advice is to start from the pretrained model, or not to trust scores.
FEW_TRAIN, FEW_VAL = 2000, 100
# Percentage of the words that the pretrained model must know to be recommended.
KNOWN_ENOUGH = 90
# Percentage of unknown tokens in val above which a lower --min-count is recommended.
UNKNOWN_TOLERATED = 3.0
SHOWN = 3  # example names per line


@dataclass(frozen=True)
class NextCommands:
    """Command lines to continue with.

    Attributes:
        train: the present one without ``--check``.
        extract: extracts the features that it needs.
        finetune: starts from the pretrained model instead.
    """

    train: str
    extract: str
    finetune: str


@dataclass
class CheckedData:
    """Captions, joined with the images that can be trained on.

    Attributes:
        whole: everything in the captions files.
        table: the captions of images that exist or, if there is a cache, have features.
        names: for each image of ``table``, its name in the source.
        source: where the images are.
        cache: the features; None if they are still to be extracted.
    """

    whole: CaptionTable
    table: CaptionTable
    names: dict[str, str]
    source: ImageSource
    cache: FeatureCache | None


def check_data(options: DecoderOptions, run: Path, force: bool, commands: NextCommands) -> int:
    """Report on the data that ``options`` name.

    Args:
        options: those of the training.
        run: the run folder, which is only read.
        force: whether a run in the folder is to be started over.
        commands: how to continue.

    Returns:
        The exit code: 0 if training can start, 1 if features have to be extracted first.

    Raises:
        UserError: training cannot start.
    """
    checked = _read(options)
    advice: list[str] = []
    try:
        _check_captions(checked, options, commands, advice)
        advice += _check_features(checked, options, commands)
        _check_run(checked, options, run, force)
    finally:
        for line in advice:  # it may help to correct an error
            echo(f"advice: {line}")
    if checked.cache is not None:
        echo(f"next: training can start\n  {commands.train}")
        return 0
    echo(f"next: extract features\n  {commands.extract}\nthen:\n  {commands.train}")
    return 1


def _read(options: DecoderOptions) -> CheckedData:
    """Read captions, and join them with the features, or with the images if there are none."""
    source, features = open_source(options.data), Path(options.features)
    captions = Path(options.captions) if options.captions else None
    table = read_captions(source, captions)
    cache = FeatureCache(features) if features.is_file() else None
    if cache is None and not source.names:
        raise UserError(f"--data {options.data}: no images there, and no features of them")
    available = source.names if cache is None else cache.names(DONE)
    restricted, names = table.restrict(available)
    return CheckedData(table, restricted, names, source, cache)


def _check_captions(
    checked: CheckedData, options: DecoderOptions, commands: NextCommands, advice: list[str]
) -> None:
    """Report on captions, images, splits, tokens and words; appends to ``advice``.

    Raises:
        UserError: training cannot start.
    """
    table = checked.table
    counts = [len(image.captions) for image in checked.whole.images]
    echo(f"captions: {checked.whole.source} ({checked.whole.layout})")
    echo(
        f"  {sum(counts):,} captions of {len(counts):,} images; per image: median "
        f"{statistics.median_low(counts)}, minimum {min(counts)}, maximum {max(counts)}"
    )
    for words, count in sorted(checked.whole.notes.items()):
        echo(f"  {words}: {count:,}")
    _check_images(checked, options.data)
    if not table.images:
        raise UserError(
            f"{table.source}: none of its images is among those of --data {options.data}"
        )
    sizes = Counter(image.split for image in table.images)
    none = f", {sizes[None]:,} in no split" if sizes[None] else ""
    per_split = ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS)
    echo(f"split: {per_split}{none} ({table.split_source})")
    advice += _advice_on_captions(table, options.tokenizer)
    what = "image" if checked.cache is None else "image with features"
    train, val = split_captions(table, options.tokenizer, what)
    advice += _check_words(
        [words for group in train.values() for words in group],
        [words for group in val.values() for words in group],
        options,
    )
    advice += _advice_on_size(table, options, len(train), len(val), commands)


def _check_images(checked: CheckedData, data: str) -> None:
    """Compare the captions with the images of the data, whatever features there are."""
    in_source = checked.source.names
    if not in_source:
        echo(f"images: none in {data}; training needs only the features")
        return
    found, names = checked.whole.restrict(in_source)
    echo(f"images: {len(in_source):,} in {data}, {len(names):,} of them with captions")
    known = names.keys() | checked.names.keys()  # an image may be gone since it was extracted
    missing = [image.name for image in checked.whole.images if image.name not in known]
    bare = sorted(set(in_source) - set(names.values()))
    for words, left_out in (
        ("captions without an image, left out", missing),
        ("images without captions, left out", bare),
    ):
        if left_out:
            echo(f"  {words}: {len(left_out):,} ({_some(left_out)})")
    # Of the notes on matching, the others are reported above, with names.
    for words, count in sorted((found.notes - checked.whole.notes).items()):
        if words.startswith(("images matched", "captioned images dropped because")):
            echo(f"  {words}: {count:,}")


def _check_words(
    train: Sequence[Sequence[str]], val: Sequence[Sequence[str]], options: DecoderOptions
) -> list[str]:
    """Report lengths and vocabulary of tokenized captions; returns advice."""
    tokenizer = tokenizer_of(options.tokenizer)
    captions = [*train, *val]
    lengths = [len(words) for words in captions]
    echo(
        f"tokens ({options.tokenizer}): per caption: median {statistics.median_low(lengths)}, "
        f"maximum {max(lengths)}"
    )
    long = sum(length > tokenizer.longest for length in lengths)
    if long:
        echo(
            f"  {long:,} captions ({100 * long / len(captions):.1f} %) have more than "
            f"{tokenizer.longest} tokens, the most that a generated caption can have"
        )
    cut = sum(length > tokenizer.longest_in_training for length in lengths)
    if cut:
        echo(f"  {cut:,} are cut to {tokenizer.longest_in_training} tokens in training")
    vocabulary = Vocabulary.build(train, options.min_count, options.tokenizer)
    counts = Counter(word for words in train for word in words)
    found = coverage(vocabulary, val)
    echo(
        f"vocabulary: {len(vocabulary) - len(SPECIALS):,} of {len(counts):,} words, those that "
        f"occur {options.min_count} times or more in train (--min-count)"
    )
    common = ", ".join(f"{word} {count}" for word, count in found.unknown.most_common(5))
    echo(
        f"  unknown tokens in val: {found.unknown.total():,} ({found.percent:.1f} %), in "
        f"{found.affected:,} of {found.captions:,} captions{': ' if common else ''}{common}"
        f"{' ...' if len(found.unknown) > 5 else ''}"
    )
    for lower in (2, 1) if found.percent > UNKNOWN_TOLERATED else ():
        percent = coverage({word for word, n in counts.items() if n >= lower}, val).percent
        if lower < options.min_count and percent < found.percent:
            return [
                f"--min-count {lower} leaves {percent:.1f} % of val's tokens unknown instead of "
                f"{found.percent:.1f} %"
            ]
    return []


def _check_features(
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
    _, present = checked.whole.restrict(checked.source.names)
    failures = cache.failures()
    failed = sorted(set(present.values()) & failures.keys())
    missing = sorted(set(present.values()) - set(cache.names()))
    advice = []
    if failed:
        why = failures[failed[0]]
        echo(f"  could not be read, left out: {len(failed):,} ({failed[0]}: {why})")
    if missing:
        echo(f"  not extracted, left out: {len(missing):,} ({_some(missing)})")
        advice.append(f"extract the {len(missing):,} images that were added: {commands.extract}")
    if identity.weights_source == "random":
        advice.append("the features are of an untrained encoder: captions will be poor")
    return advice


def _check_run(checked: CheckedData, options: DecoderOptions, run: Path, force: bool) -> None:
    """Report whether the run folder holds a run that training would resume.

    Raises:
        UserError: that run has other settings or features.
    """
    if not (run / RESUME).is_file():
        return
    if force:
        echo(f"run: {run} is started over (--force)")
        return
    refuse_other_settings(run, {**asdict(options), **split_hashes(checked.table)})
    saved = load_checkpoint(run / LAST)
    mismatch = None if checked.cache is None else saved.encoder.mismatch(checked.cache.identity)
    if mismatch:
        raise UserError(
            f"{options.features}: not the features that {run} started with ({mismatch})"
        )
    echo(f"run: {run} resumes after epoch {saved.epoch} of {options.epochs}")


def _advice_on_captions(table: CaptionTable, tokenizer: str) -> list[str]:
    """Recommend a tokenizer, and point out placeholders and file names among the captions."""
    advice = []
    text, count = most_shared(table.images)
    if count > max(4, 0.1 * len(table.images)):
        advice.append(
            f"{count:,} of {len(table.images):,} images share the caption {_quoted(text)}: the "
            "decoder will often generate it; is it a placeholder?"
        )
    better = better_tokenizer(table.images, tokenizer)
    unspaced = unspaced_example(table.images)
    if better is not None:
        advice.append(f"--tokenizer {better[0]}: {better[1]}")
    elif unspaced is not None and tokenizer != CHARACTERS:
        advice.append(
            f"most captions have no space, such as {_quoted(unspaced)}: are they file names?"
        )
    return advice


def _advice_on_size(
    table: CaptionTable, options: DecoderOptions, train: int, val: int, commands: NextCommands
) -> list[str]:
    advice = []
    if train < FEW_TRAIN:
        line = f"{train:,} training images are few: many captions will be alike or wrong"
        known = _known_to_pretrained(table) if options.tokenizer == ENGLISH else 0.0
        if known >= KNOWN_ENOUGH:
            line += (
                f"; the pretrained model knows {known:.0f} % of their words, start from it: "
                f"{commands.finetune}"
            )
        advice.append(line)
    if val < FEW_VAL:
        advice.append(f"{val:,} val images are few: scores will depend on chance")
    return advice


def _known_to_pretrained(table: CaptionTable) -> float:
    """Return the percentage of training tokens in the pretrained model's vocabulary."""
    try:
        vocabulary = load_checkpoint(Path(PRETRAINED)).vocabulary
    except UserError:
        return 0.0  # it is not installed
    groups = tokenized(table.of_split("train"), ENGLISH)
    tokens = [token for group in groups.values() for words in group for token in words]
    return 100 * sum(token in vocabulary for token in tokens) / max(1, len(tokens))


def _some(names: Sequence[str]) -> str:
    """Return the first few names."""
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _quoted(text: str) -> str:
    """Quote a caption, or its beginning."""
    return f'"{text[:60]}{"..." if len(text) > 60 else ""}"'
