"""Find and read the captions of a data set as one table: image, split, captions.

>>> table = read_captions(Path("data/flickr8k"))
>>> table, images = table.restrict(cache.names())     # only images in the cache
>>> for image in table.of_split("train"):
...     cache.rows([images[image.name]]), image.captions
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from pipeline.datasets.caption_collector import (
    SPLIT_WORDS,
    SPLITS,
    CaptionCollector,
    normalize_name,
)
from pipeline.datasets.caption_json import split_of_file
from pipeline.datasets.caption_readers import find_sidecars, read_file, read_shards
from pipeline.datasets.flickr8k import official_splits
from pipeline.datasets.image_sources import ImageFolder, ImageSource
from pipeline.datasets.tar_shards import TarShards
from pipeline.utils.errors import UserError

# The first group that matches is read: in the folder, else in its folders named after a split. If
# it matches several files, the user must choose, unless each is named after a different split.
COCO_FILES = ("captions_*.json", "annotations/captions_*.json")
SEARCH_ORDER = (
    ("Flickr8k.token.txt",),  # name.jpg#0<TAB>caption
    ("Flickr8k_text/Flickr8k.token.txt",),
    ("captions.txt",),  # Kaggle's copy of Flickr8k: image,caption
    ("dataset*.json",),  # Karpathy's JSON
    COCO_FILES,
    ("captions.csv",),
    ("metadata.csv", "metadata.jsonl"),  # Hugging Face's imagefolder
    ("*.csv", "*.tsv"),
    ("captions.jsonl", "captions.json"),
    ("*.jsonl",),
)
# Searched after text files beside images, as such a folder may hold other JSON files.
SPLIT_FILES = ("*train*.json", "*val*.json", "*dev*.json", "*test*.json")

CaptionPaths: TypeAlias = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its captions: raw text, single spaces, never empty."""

    name: str  # the path in the captions file, with "/"
    split: str | None  # "train", "val" or "test"; None: in no split
    captions: tuple[str, ...]


@dataclass
class CaptionTable:
    """All captioned images of a data set, sorted by name, and where they came from."""

    images: list[CaptionedImage]
    source: Path  # the captions file, or the first of several
    layout: str  # such as "COCO JSON, 2 files"
    split_source: str  # such as "official Flickr8k lists"
    notes: Counter[str] = field(default_factory=Counter)  # what was dropped or repaired -> how many
    ids: dict[str, int] = field(default_factory=dict)  # COCO's, by image name

    def image_id(self, name: str) -> int | str:
        """Return the image's id in COCO's results format: its integer id, else its name."""
        return self.ids.get(name, name)

    def of_split(self, split: str) -> list[CaptionedImage]:
        """Return the images of "train", "val" or "test", sorted by name."""
        return [image for image in self.images if image.split == split]

    def split_hash(self, split: str) -> str:
        """Return 12 hex digits of the SHA-256 of a split's image names: sorted, one per line."""
        names = "\n".join(image.name for image in self.of_split(split))
        return hashlib.sha256(names.encode("utf-8")).hexdigest()[:12]

    def restrict(self, available: Iterable[str]) -> tuple[CaptionTable, dict[str, str]]:
        """Keep the captioned images that are among the ``available`` relative paths.

        A name matches the path that equals it; else the only path that ends with it (``x.jpg`` and
        ``Images/x.jpg``) or that it ends with; else the only one with the same file name. If
        several paths fit a name, or several names fit a path, there is no match.

        Returns the reduced table, whose notes count what is missing, and name -> available path.
        """
        images, extra = match_names([image.name for image in self.images], available)
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


def read_captions(
    data: Path | ImageSource, captions: CaptionPaths = None, encoding: str | None = None
) -> CaptionTable:
    """Read the captions of the folder or shards ``data``, or those in ``captions``.

    ``captions`` are files of any layout, or folders of images and text files; a path may be
    relative to the working folder or to ``data``. Bad lines are dropped and counted in the notes,
    which also count images found in several files. For ``encoding`` see ``decode_text``.

    Raises:
        UserError: no captions file is found, several compete, one cannot be read or decoded, or
            there are no captions.
    """
    collector = CaptionCollector(encoding)
    source = ImageFolder(data) if isinstance(data, Path) else data
    if isinstance(source, TarShards) and not captions:
        paths = [Path(source.origin)]
        layout = read_shards(source, collector)
    else:
        folder = source.folder if isinstance(source, ImageFolder) else Path()
        paths = _find_files(folder, captions)
        layout = _read_files(paths, folder, collector)
    notes, found = collector.finish()
    if not found:
        reasons = "; ".join(f"{words}: {count:,}" for words, count in sorted(notes.items()))
        raise UserError(f"{paths[0]}: no captions could be read ({reasons or 'it is empty'})")
    names = sorted(found)
    splits, split_source = _assign_splits(names, collector, source)
    images = [CaptionedImage(name, splits.get(name), tuple(found[name])) for name in names]
    ids = {name: collector.ids[name] for name in names if name in collector.ids}
    if len({(splits.get(name), number) for name, number in ids.items()}) < len(ids):
        ids = {}  # from several files that use the same ids
    return CaptionTable(images, paths[0], layout, split_source, notes, ids)


def caption_paths(captions: CaptionPaths) -> list[str]:
    """Return the paths as strings; the settings of earlier runs hold a single one."""
    if not captions:
        return []
    return [str(path) for path in ([captions] if isinstance(captions, str | Path) else captions)]


def _find_files(data: Path, captions: CaptionPaths) -> list[Path]:
    """List the files to read: ``captions``, or those found in ``data``.

    A folder stands for the text files beside its images.
    """
    if captions:
        return list(
            dict.fromkeys(_find_named(data, Path(path)) for path in caption_paths(captions))
        )
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; --data names the folder of a data set")
    found = _search(data, SEARCH_ORDER)
    found = found or [p for folder in _split_folders(data) for p in _search(folder, SEARCH_ORDER)]
    if not found and find_sidecars(data)[0]:
        return [data]
    found = found or _search(data, [SPLIT_FILES])
    if not found:
        looked_for = ", ".join(name for names in (*SEARCH_ORDER, SPLIT_FILES) for name in names)
        raise UserError(
            f"{data}: no captions file; looked for {looked_for} and for a .txt or .caption beside "
            f"each image; {_advice(data)}"
        )
    return found


def _advice(data: Path) -> str:
    """Return what to do with a folder in which no captions were found."""
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        if _split_folders(folder):
            return f"{folder} has folders of splits: pass --data {folder}"
    if any(data.rglob("*.parquet")):
        return "Parquet files are not read: save the images as files, with a metadata.csv"
    return "name another one with --captions"


def _split_folders(data: Path) -> list[Path]:
    """List the folders named after a split."""
    return [path for path in sorted(data.iterdir()) if path.name.lower() in SPLIT_WORDS]


def _find_named(data: Path, captions: Path) -> Path:
    for path in (captions, data / captions):
        if path.is_file() or (path.is_dir() and find_sidecars(path)[0]):
            return path
    raise UserError(f"{captions}: no such file; --captions names the file with the captions")


def _search(folder: Path, order: Iterable[tuple[str, ...]]) -> list[Path]:
    """Return the files of the first group that has any."""
    for patterns in order:
        # By file name, as the same COCO file may be in both places.
        found = {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern))}
        # macOS leaves ._x.csv beside x.csv; Hugging Face's dataset_info.json holds no captions.
        ignored = (".", "dataset_info")
        paths = [found[name] for name in sorted(found) if not name.startswith(ignored)]
        if len(paths) > 1 and patterns is not COCO_FILES and not _are_splits(paths):
            names = ", ".join(path.name for path in paths[:5])
            raise UserError(f"{folder}: several captions files ({names}); choose with --captions")
        if paths:
            return paths
    return []


def _are_splits(paths: Sequence[Path]) -> bool:
    splits = [split_of_file(path) for path in paths]
    return all(splits) and len(set(splits)) == len(paths)


def _read_files(paths: Sequence[Path], data: Path, collector: CaptionCollector) -> str:
    """Read the files; return their layouts.

    Image names in a folder named after a split are relative to it.
    """
    several, root = len(paths) > 1, data.resolve()
    splits = {split_of_file(path) for path in paths}
    by_name = len(splits) > 1 and "" not in splits
    layouts: dict[str, None] = {}
    for path in paths:
        parent, folder = (path if path.is_dir() else path.parent).resolve(), ""
        if parent != root and parent.is_relative_to(root):
            parts = parent.relative_to(root).parts
            if parts[0].lower() in SPLIT_WORDS or (several and path.is_dir()):
                folder = normalize_name("/".join((*parts, "")))
        collector.start_file(folder, split_of_file(path) if by_name else "")
        layouts[read_file(path, collector)] = None
    return " and ".join(layouts) + (f", {len(paths)} files" if several else "")


def _assign_splits(
    names: list[str], collector: CaptionCollector, source: ImageSource
) -> tuple[dict[str, str], str]:
    """Return image name -> split, and where the splits come from."""
    if any(name in collector.splits for name in names):
        return collector.splits, ", ".join(collector.split_sources)
    paths = {name: name for name in names}
    if isinstance(source, ImageFolder) and source.folder.is_dir() and _split_folders(source.folder):
        paths |= match_names(names, source.names)[0]
    by_folder = _folder_splits(paths)
    if len({"train", "val"} & {*by_folder.values()}) == 2:
        return by_folder, "the names of the folders"
    if {"train", "test"} <= {*by_folder.values()}:
        # No test image may be trained on.
        of_train = _hash_splits([name for name in names if by_folder.get(name) == "train"])
        val = {name: "val" for name, split in of_train.items() if split == "val"}
        return by_folder | val, "the names of the folders; val: a hash of those in train (10 %)"
    official = official_splits(names)
    if official is not None:
        return official, "official Flickr8k lists"
    return _hash_splits(names), "hash of the image name (80/10/10)"


def _folder_splits(paths: dict[str, str]) -> dict[str, str]:
    """Return the splits of images whose first folder below the common ones is named after one."""
    # The common prefix, cut at a slash.
    shared = os.path.commonprefix([*paths.values()])  # noqa: RUF071
    start = shared.rfind("/") + 1
    firsts = {name: path[start:].rpartition("/")[0].split("/")[0] for name, path in paths.items()}
    words = {name: word.lower() for name, word in firsts.items()}
    return {name: SPLIT_WORDS[word] for name, word in words.items() if word in SPLIT_WORDS}


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


def match_names(
    names: Sequence[str], available: Iterable[str]
) -> tuple[dict[str, str], Counter[str]]:
    """Match normalized names; return name -> available path, and notes.

    See ``CaptionTable.restrict``.
    """
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
            "captioned images that are missing, dropped": missing,
            "captioned images dropped because their name fits several images, or several "
            "images one image": len(unmatched) - missing,
            "images matched by file name alone, in another folder": len(matched) - before,
            "images without captions": len(paths) - len(matched),
        }
    )
    return {name: paths[path] for name, path in matched.items()}, +notes


def _by_tail(paths: Iterable[str]) -> dict[str, str]:
    """Index paths by each of their tails: tail -> the path that ends with it, "" if several do."""
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
