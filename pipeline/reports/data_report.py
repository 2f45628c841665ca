"""What ``train_decoder.py --check`` says of captions and images; see ``data_check``.

Each function prints a few lines on standard output, and gives advice to be printed at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.datasets.caption_table import CaptionedImage, CaptionTable
from pipeline.datasets.vocabulary import tokenizer_of
from pipeline.reports.caption_statistics import (
    Coverage,
    Spread,
    coverage,
    identical_files,
    repetitions,
)
from pipeline.utils.terminal import echo

SHOWN = 3  # names of a kind
OTHER_COUNTS = (1, 2, 3, 5, 10)


def say_captions(table: CaptionTable) -> None:
    """Report where captions came from, how many there are, and what was dropped or mended."""
    echo(f"captions: {table.source} ({table.layout})")
    counts = [len(image.captions) for image in table.images]
    spread = Spread.of(counts)
    echo(
        f"  {sum(counts):,} captions of {len(counts):,} images; an image has {spread.median} in "
        f"the median, {spread.least} at least, {spread.most} at most"
    )
    for words, count in sorted(table.notes.items()):
        echo(f"  {words}: {count:,}")


def say_lengths(captions: Sequence[Sequence[str]], tokenizer: str) -> None:
    """Report how many tokens captions have, and how many have too many."""
    chosen = tokenizer_of(tokenizer)
    spread = Spread.of(map(len, captions))
    echo(
        f"tokens ({tokenizer}): {spread.median} a caption in the median, {spread.high} at 95 %, "
        f"{spread.most} at most"
    )
    long = sum(len(words) > chosen.longest for words in captions)
    if long:
        echo(
            f"  {long:,} captions ({100 * long / len(captions):.1f} %) have more than the "
            f"{chosen.longest} tokens that a caption is given when images are captioned"
        )
    cut = sum(len(words) > chosen.longest_in_training for words in captions)
    if cut:
        echo(f"  {cut:,} are cut after {chosen.longest_in_training} tokens in training")


def say_vocabulary(
    train: Sequence[Sequence[str]], val: Sequence[Sequence[str]], min_count: int
) -> list[str]:
    """Report which words val has that train has too rarely; returns advice."""
    counts = Counter(word for words in train for word in words)
    chosen = coverage(counts, val, min_count)
    echo(
        f"vocabulary: {chosen.known:,} words that train has {min_count} times or more "
        f"(--min-count), of {len(counts):,}"
    )
    if chosen.unknown:
        common = ", ".join(f"{word} {count}" for word, count in chosen.unknown.most_common(5))
        echo(
            f"  val has {chosen.unknown.total():,} other tokens ({chosen.percent:.1f} %) in "
            f"{chosen.touched:,} of its {chosen.captions:,} captions: {common}"
            f"{' ...' if len(chosen.unknown) > 5 else ''}"
        )
    else:
        echo("  val has no other words")
    others = [
        coverage(counts, val, count)
        for count in OTHER_COUNTS
        if count != min_count and any(n >= count for n in counts.values())
    ]
    rows = "; ".join(f"{c.min_count}: {c.known:,} words, {c.percent:.1f} %" for c in others)
    echo(f"  with another --min-count: {rows}")
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


def say_duplicates(images: Sequence[CaptionedImage], paths: Mapping[str, Path]) -> list[str]:
    """Report captions and images that come more than once; returns advice.

    Args:
        images: with their captions.
        paths: where each image's image is, if it is there.
    """
    splits = {image.name: image.split for image in images}
    repeated = repetitions(images)
    groups, empty, all_compared = identical_files(paths)
    leaks = [g for g in groups if len({splits[name] for name in g if splits[name]}) > 1]
    lines, advice = [], []
    if repeated.within:
        lines.append(f"captions given twice to one image: {repeated.within:,}")
    if repeated.across:
        text, count = repeated.commonest
        lines.append(
            f"captions of several images: {repeated.across:,} (most often {quoted(text)}, of "
            f"{count:,} images)"
        )
        if count > max(4, 0.1 * repeated.images):
            advice.append(
                f"{count:,} of {repeated.images:,} images share the caption {quoted(text)}: "
                "the decoder will say it often; is it a placeholder?"
            )
    if groups:
        example = " = ".join(groups[0][:SHOWN])
        lines.append(f"images under several names: {len(groups):,} (such as {example})")
    if leaks:
        example = ", ".join(f"{name} ({splits[name] or 'no split'})" for name in leaks[0][:SHOWN])
        lines.append(f"  of these in two splits: {len(leaks):,} (such as {example})")
        advice.append(
            f"{len(leaks):,} images are in two splits under two names: scores will be too good; "
            "remove them from one"
        )
    if not all_compared:
        lines.append("not all images of equal size were compared: that would take too long")
    echo(f"duplicates: {'' if lines else 'none'}".rstrip())
    for line in lines:
        echo(f"  {line}")
    if empty:
        advice.append(f"{len(empty):,} images are empty files ({some(empty)})")
    return advice


def some(names: Sequence[str]) -> str:
    """Name the first few of some things."""
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def quoted(text: str) -> str:
    """Quote a caption, or its beginning."""
    return f'"{text[:60]}{"..." if len(text) > 60 else ""}"'


def duration(seconds: float) -> str:
    """Write a time: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def size(number: float) -> str:
    """Write a number of bytes in MB or GB."""
    return f"{number / 1e9:.1f} GB" if number >= 0.95e9 else f"{max(1, round(number / 1e6))} MB"
