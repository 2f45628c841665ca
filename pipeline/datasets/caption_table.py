"""Find and read the captions of a data set as one table: image, split, captions.

>>> table = read_captions(Path("data/flickr8k"))
>>> table, images = table.restrict(cache.names())     # only images that the cache has
>>> for image in table.of_split("train"):
...     cache.rows([images[image.name]]), image.captions
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.datasets.caption_readers import (
    SPLITS,
    CaptionCollector,
    find_sidecars,
    normalize_name,
    read_file,
    read_shards,
)
from pipeline.datasets.flickr8k import official_splits
from pipeline.datasets.image_sources import ImageFolder, ImageSource
from pipeline.datasets.tar_shards import TarShards
from pipeline.utils.errors import UserError

# The first group with a file in the folder is read. Of several files in a group the user chooses
# one, except for COCO, which has a file per split. Text files beside the images come last.
COCO_FILES = ("captions_*.json", "annotations/captions_*.json")
SEARCH_ORDER = (
    ("Flickr8k.token.txt",),  # name.jpg#0<TAB>caption
    ("Flickr8k_text/Flickr8k.token.txt",),
    ("captions.txt",),  # Kaggle's copy of Flickr8k: image,caption
    ("dataset*.json",),  # Karpathy's JSON
    COCO_FILES,
    ("captions.csv",),
    ("*.csv", "*.tsv"),
    ("captions.jsonl",),
    ("metadata.jsonl",),
    ("*.jsonl",),
)


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its captions: raw text, single spaces, never empty."""

    name: str  # the path that the captions file gives, with "/"
    split: str | None  # "train", "val" or "test"; None: in no split
    captions: tuple[str, ...]


@dataclass
class CaptionTable:
    """All captioned images of a data set, sorted by name, and where they came from."""

    images: list[CaptionedImage]
    source: Path  # the captions file, or the first of several
    layout: str  # such as "COCO JSON"
    split_source: str  # such as "official Flickr8k lists"
    notes: Counter[str] = field(default_factory=Counter)  # what was dropped or repaired -> how many

    def of_split(self, split: str) -> list[CaptionedImage]:
        """Return the images of "train", "val" or "test", sorted by name."""
        return [image for image in self.images if image.split == split]

    def split_hash(self, split: str) -> str:
        """Return 12 hex digits of the SHA-256 of a split's image names: sorted, one per line."""
        names = "\n".join(image.name for image in self.of_split(split))
        return hashlib.sha256(names.encode("utf-8")).hexdigest()[:12]

    def restrict(self, available: Iterable[str]) -> tuple[CaptionTable, dict[str, str]]:
        """Keep the captioned images that are among the ``available`` relative paths.

        A name takes the path that equals it; else the only path that ends in it (``x.jpg`` and
        ``Images/x.jpg``) or in which it ends; else the only one with the same file name. If
        several paths fit a name, or several names a path, none is taken.

        Returns the smaller table, whose notes count what is missing, and name -> available path.
        """
        images, extra = _match([image.name for image in self.images], available)
        kept = [image for image in self.images if image.name in images]
        return replace(self, images=kept, notes=self.notes + extra), images

    def summary(self) -> list[str]:
        """Return the lines to print: source, counts, splits and every note."""
        counts = Counter(image.split for image in self.images)
        captions = sum(len(image.captions) for image in self.images)
        per_split = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
        none = f", {counts[None]:,} in no split" if counts[None] else ""
        return [
            f"captions: {self.source} ({self.layout})",
            f"images: {len(self.images):,} with {captions:,} captions: {per_split}{none}",
            f"split: {self.split_source}",
            *(f"{words}: {count:,}" for words, count in sorted(self.notes.items())),
        ]


def read_captions(data: Path | ImageSource, captions: Path | None = None) -> CaptionTable:
    """Read the captions of the folder or the shards ``data``, or those in ``captions``.

    ``captions`` is a file of any layout, or a folder of images with texts; its path may be
    relative to the working folder or to ``data``. Single bad lines are dropped and counted in
    the table's notes.

    Raises:
        UserError: no captions file is found, several compete, or the file cannot be read or
            holds no captions.
    """
    collector = CaptionCollector()
    source = ImageFolder(data) if isinstance(data, Path) else data
    if isinstance(source, TarShards) and captions is None:
        paths = [Path(source.origin)]
        layouts = [read_shards(source, collector)]
    else:
        folder = source.folder if isinstance(source, ImageFolder) else Path()
        paths = _find_files(folder, captions)
        layouts = [read_file(path, collector) for path in paths]
    notes, found = collector.finish()
    if not found:
        reasons = "; ".join(f"{words}: {count:,}" for words, count in sorted(notes.items()))
        raise UserError(f"{paths[0]}: no captions could be read ({reasons or 'it is empty'})")
    splits, split_source = _assign_splits(sorted(found), collector)
    images = [CaptionedImage(name, splits.get(name), tuple(found[name])) for name in sorted(found)]
    return CaptionTable(images, paths[0], layouts[0], split_source, notes)


def _find_files(data: Path, captions: Path | None) -> list[Path]:
    """List the files to read: ``captions``, or those found in ``data``.

    A folder stands for the text files beside its images.
    """
    if captions is not None:
        for path in (captions, data / captions):
            if path.is_file() or (path.is_dir() and find_sidecars(path)[0]):
                return [path]
        raise UserError(f"{captions}: no such file; --captions names the file with the captions")
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; --data names the folder of a data set")
    for patterns in SEARCH_ORDER:
        # By file name, as the same COCO file may be in both places.
        found = {path.name: path for pattern in patterns for path in sorted(data.glob(pattern))}
        # macOS leaves ._x.csv beside x.csv; Hugging Face's dataset_info.json holds no captions.
        ignored = (".", "dataset_info")
        paths = [found[name] for name in sorted(found) if not name.startswith(ignored)]
        if len(paths) > 1 and patterns is not COCO_FILES:
            names = ", ".join(path.name for path in paths[:5])
            raise UserError(f"{data}: several captions files ({names}); choose with --captions")
        if paths:
            return paths
    if find_sidecars(data)[0]:
        return [data]
    looked_for = ", ".join(pattern for patterns in SEARCH_ORDER for pattern in patterns)
    raise UserError(
        f"{data}: no captions file; looked for {looked_for} and for a .txt beside each image; "
        "name another one with --captions"
    )


def _assign_splits(names: list[str], collector: CaptionCollector) -> tuple[dict[str, str], str]:
    """Return image name -> split, and where the splits come from."""
    if any(name in collector.splits for name in names):
        return collector.splits, collector.split_source
    official = official_splits(names)
    if official is not None:
        return official, "official Flickr8k lists"
    return _hash_splits(names), "hash of the image name (80/10/10)"


def _hash_splits(names: list[str]) -> dict[str, str]:
    """Split 80/10/10 by the SHA-256 of the image name, so that new images never move old ones."""
    fractions = {}
    for name in names:
        digest = hashlib.sha256(name.encode("utf-8")).digest()
        fractions[name] = int.from_bytes(digest[:8], "big") / 2**64
    train = sum(fraction < 0.8 for fraction in fractions.values())
    train_and_val = sum(fraction < 0.9 for fraction in fractions.values())
    if len(names) >= 2:  # neither train nor val may be empty
        train = min(max(train, 1), len(names) - 1)
        train_and_val = max(train_and_val, train + 1)
    return {
        name: "train" if position < train else "val" if position < train_and_val else "test"
        for position, name in enumerate(sorted(names, key=lambda name: (fractions[name], name)))
    }


def _match(names: list[str], available: Iterable[str]) -> tuple[dict[str, str], Counter[str]]:
    """Match names, see ``CaptionTable.restrict``; return name -> available path, and notes."""
    paths = {normalize_name(path): path for path in available}
    matched = {name: name for name in names if name in paths}
    by_tail = _by_tail(paths) if len(matched) < len(names) else {}

    def by_path(name: str) -> set[str]:
        related = {tail for tail in _tails(name) if tail in paths}
        return related | ({by_tail[name]} if name in by_tail else set())

    def by_file_name(name: str) -> set[str]:
        file_name = name.rpartition("/")[2]
        return {by_tail[file_name]} if file_name in by_tail else set()

    for candidates in (by_path, by_file_name):
        before = len(matched)
        claims: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            if name not in matched and len(found := candidates(name)) == 1:
                claims[found.pop()].append(name)
        taken = set(matched.values())
        for path, claimants in claims.items():
            if path and path not in taken and len(claimants) == 1:
                matched[claimants[0]] = path
    unmatched = [name for name in names if name not in matched]
    missing = sum(not by_file_name(name) for name in unmatched)
    notes = Counter(
        {
            "captioned images without an image dropped": missing,
            "captioned images dropped because their name fits several images, or several "
            "images one image": len(unmatched) - missing,
            "images matched by file name alone, in another folder": len(matched) - before,
            "images without captions": len(paths) - len(matched),
        }
    )
    return {name: paths[path] for name, path in matched.items()}, +notes


def _by_tail(paths: Iterable[str]) -> dict[str, str]:
    """Index paths by each of their tails: tail -> the path that ends in it, "" for several."""
    by_tail: dict[str, str] = {}
    for path in paths:
        for tail in _tails(path):
            by_tail[tail] = "" if tail in by_tail else path
    return by_tail


def _tails(path: str) -> Iterator[str]:
    """Yield ``a/b/c``, ``b/c`` and ``c`` of ``a/b/c``."""
    yield path
    while "/" in path:
        path = path.split("/", 1)[1]
        yield path
