"""``train_decoder.py --check``: report whether training can start, and what looks wrong.

Everything is read as training reads it; nothing is trained or written. The report is printed line
by line, so that what was found before an error is still shown.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.datasets.caption_collector import SPLITS
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.tokenizers import CHARACTERS, ENGLISH, tokenizer_of
from pipeline.datasets.vocabulary import SPECIALS, Vocabulary
from pipeline.features.cache import DONE, FeatureCache, partial_path
from pipeline.features.feature_set import rows_of
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.pretrained import LAST, PRETRAINED
from pipeline.reports.caption_statistics import (
    better_tokenizer,
    coverage,
    most_shared,
    unspaced_example,
)
from pipeline.training.options import DecoderOptions
from pipeline.training.run_folder import (
    can_resume,
    refuse_other_features,
    refuse_other_settings,
    split_hashes,
)
from pipeline.training.validation import Tokenized, split_captions
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
    """Command lines to continue with."""

    train: str  # the current one without --check
    extract: str  # extracts the features that training needs
    finetune: str  # starts from the pretrained model instead


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
    check = _DataCheck(options, commands)
    try:
        check.captions()
        check.features()
        check.run(run, force)
    finally:
        for line in check.advice:  # it may help to correct an error
            echo(f"advice: {line}")
    if check.cache is not None:
        echo(f"next: training can start\n  {commands.train}")
        return 0
    echo(f"next: extract features\n  {commands.extract}\nthen:\n  {commands.train}")
    return 1


class _DataCheck:
    """Captions, joined with the features, or with the images if there are no features.

    Attributes:
        cache: the features; None if they are still to be extracted.
        whole: everything in the captions files.
        table: the captions of images that exist or, if there is a cache, have features.
        names: for each image of ``table``, its name in the source.
        advice: what to consider, printed at the end.
    """

    def __init__(self, options: DecoderOptions, commands: NextCommands) -> None:
        self.options, self.commands = options, commands
        self.source, features = open_source(options.data), Path(options.features)
        self.whole = read_captions(self.source, options.captions, options.encoding)
        self.cache = FeatureCache(features) if features.is_file() else None
        if self.cache is None and not self.source.names:
            raise UserError(f"--data {options.data}: no images there, and no features of them")
        available = self.source.names if self.cache is None else self.cache.names(DONE)
        self.table, self.names = self.whole.restrict(available)
        self.advice: list[str] = []

    def captions(self) -> None:
        """Report on captions, images, splits, tokens and words."""
        table, options = self.table, self.options
        counts = [len(image.captions) for image in self.whole.images]
        echo(f"captions: {self.whole.source} ({self.whole.layout})")
        echo(
            f"  {sum(counts):,} captions of {len(counts):,} images; per image: median "
            f"{statistics.median_low(counts)}, minimum {min(counts)}, maximum {max(counts)}"
        )
        for words, count in sorted(self.whole.notes.items()):
            echo(f"  {words}: {count:,}")
        self._images()
        if not table.images:
            raise UserError(
                f"{table.source}: none of its images is among those of --data {options.data}"
            )
        sizes = Counter(image.split for image in table.images)
        none = f", {sizes[None]:,} in no split" if sizes[None] else ""
        per_split = ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS)
        echo(f"split: {per_split}{none} ({table.split_source})")
        self._advise_on_captions()
        what = "image" if self.cache is None else "image with features"
        train, val = split_captions(table, options.tokenizer, what)
        self._words(*([words for group in s.values() for words in group] for s in (train, val)))
        self._advise_on_size(train, val)

    def _images(self) -> None:
        """Compare the captions with the images of the data, whatever features there are."""
        in_source = self.source.names
        if not in_source:
            echo(f"images: none in {self.options.data}; training needs only the features")
            return
        found, names = self.whole.restrict(in_source)
        echo(
            f"images: {len(in_source):,} in {self.options.data}, {len(names):,} of them with "
            "captions"
        )
        known = names.keys() | self.names.keys()  # an image may be gone since extraction
        missing = [image.name for image in self.whole.images if image.name not in known]
        bare = sorted(set(in_source) - set(names.values()))
        for words, left_out in (
            ("captions without an image, left out", missing),
            ("images without captions, left out", bare),
        ):
            if left_out:
                echo(f"  {words}: {len(left_out):,} ({_some(left_out)})")
        # The other notes on matching are reported above, with names.
        for words, count in sorted((found.notes - self.whole.notes).items()):
            if words.startswith(("images matched", "captioned images dropped because")):
                echo(f"  {words}: {count:,}")

    def _words(self, train: Sequence[Sequence[str]], val: Sequence[Sequence[str]]) -> None:
        """Report lengths and vocabulary of tokenized captions."""
        options = self.options
        tokenizer = tokenizer_of(options.tokenizer)
        lengths = [len(words) for words in [*train, *val]]
        echo(
            f"tokens ({options.tokenizer}): per caption: median {statistics.median_low(lengths)}, "
            f"maximum {max(lengths)}"
        )
        long = sum(length > tokenizer.longest for length in lengths)
        if long:
            echo(
                f"  {long:,} captions ({100 * long / len(lengths):.1f} %) have more than "
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
                self.advice.append(
                    f"--min-count {lower} leaves {percent:.1f} % of val's tokens unknown instead "
                    f"of {found.percent:.1f} %"
                )
                break

    def features(self) -> None:
        """Report which captioned images the cache covers."""
        path, cache = Path(self.options.features), self.cache
        if cache is None:
            begun = partial_path(path).is_file()
            echo(f"features: {path} is {'not finished' if begun else 'not there yet'}")
            return
        identity = cache.identity
        used = [self.names[image.name] for image in self.table.images]
        rows_of(cache, used)  # raises if a row is damaged
        echo(
            f"features: {path}, of {len(used):,} captioned images ({identity.encoder} with "
            f"{Path(identity.weights_source).name}, {identity.precision}, {identity.engine})"
        )
        present = set(self.whole.restrict(self.source.names)[1].values())
        failures = cache.failures()
        failed = sorted(present & failures.keys())
        missing = sorted(present - set(cache.names()))
        if failed:
            why = failures[failed[0]]
            echo(f"  could not be read, left out: {len(failed):,} ({failed[0]}: {why})")
        if missing:
            echo(f"  not extracted, left out: {len(missing):,} ({_some(missing)})")
            self.advice.append(
                f"extract the {len(missing):,} images that were added: {self.commands.extract}"
            )
        if identity.weights_source == "random":
            self.advice.append("the features are of an untrained encoder: captions will be poor")

    def run(self, run: Path, force: bool) -> None:
        """Report whether the run folder holds a run that training would resume.

        Raises:
            UserError: that run has other settings or features.
        """
        if can_resume(run, force):
            refuse_other_settings(run, {**asdict(self.options), **split_hashes(self.table)})
            saved = load_checkpoint(run / LAST)
            if self.cache is not None:
                refuse_other_features(run, saved, self.cache)
            echo(f"run: {run} resumes after epoch {saved.epoch} of {self.options.epochs}")
        elif can_resume(run, force=False):
            echo(f"run: {run} is started over (--force)")

    def _advise_on_captions(self) -> None:
        """Recommend a tokenizer, and point out placeholders and file names among the captions."""
        images, tokenizer = self.table.images, self.options.tokenizer
        text, count = most_shared(images)
        if count > max(4, 0.1 * len(images)):
            self.advice.append(
                f"{count:,} of {len(images):,} images share the caption {_quoted(text)}: the "
                "decoder will often generate it; is it a placeholder?"
            )
        better = better_tokenizer(images, tokenizer)
        unspaced = unspaced_example(images)
        if better is not None:
            self.advice.append(f"--tokenizer {better[0]}: {better[1]}")
        elif unspaced is not None and tokenizer != CHARACTERS:
            self.advice.append(
                f"most captions have no space, such as {_quoted(unspaced)}: are they file names?"
            )

    def _advise_on_size(self, train: Tokenized, val: Tokenized) -> None:
        if len(train) < FEW_TRAIN:
            line = f"train has few images ({len(train):,}): many captions will be alike or wrong"
            known = _known_to_pretrained(train) if self.options.tokenizer == ENGLISH else 0.0
            if known >= KNOWN_ENOUGH:
                line += (
                    f"; the pretrained model knows {known:.0f} % of their words, start from it: "
                    f"{self.commands.finetune}"
                )
            self.advice.append(line)
        if len(val) < FEW_VAL:
            self.advice.append(f"val has few images ({len(val):,}): scores will depend on chance")


def _known_to_pretrained(train: Tokenized) -> float:
    """Return the percentage of training tokens in the pretrained model's vocabulary."""
    try:
        vocabulary = load_checkpoint(Path(PRETRAINED)).vocabulary
    except UserError:
        return 0.0  # it is not installed
    return (
        100 - coverage(vocabulary, [words for group in train.values() for words in group]).percent
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _quoted(text: str) -> str:
    return f'"{text[:60]}{"..." if len(text) > 60 else ""}"'
