"""Caption many images and write the captions to their destinations: what caption.py does.

Existing text files and metadata are kept unless they are to be overwritten; an image is captioned
if any destination needs its caption. Captions for an output file are recorded one by one
(``resume``), and the file is written from these records at the end.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.captioner import Captioner, Prediction
from pipeline.decoding.options import SearchOptions, describe_search
from pipeline.outputs.formats import decodable, name_in, read_predictions, write_predictions
from pipeline.outputs.gallery import GalleryItem, write_gallery
from pipeline.outputs.metadata import (
    MetadataError,
    check_available,
    read_description,
    write_description,
)
from pipeline.outputs.resume import PartialResults
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write, check_replaceable
from pipeline.utils.progress import progress_bar

PAGE_CAPTIONS = 5


@dataclass(frozen=True)
class Destinations:
    """Where captions go.

    Attributes:
        layout: format on standard output or in ``output``: a key of ``formats.WRITERS``.
        output: a file instead of standard output.
        sidecar: also write a text file next to each image: photo.txt for photo.jpg.
        metadata: also write the caption into each image's metadata as its description.
        page: also write a gallery page.
        thumbnails: the page's thumbnails are ``inside`` it or in a folder ``beside`` it.
        overwrite: replace existing text files and descriptions.
        skip_existing: keep the captions already in ``output``, and add to them.
    """

    layout: str = "text"
    output: Path | None = None
    sidecar: bool = False
    metadata: bool = False
    page: Path | None = None
    thumbnails: str = "inside"
    overwrite: bool = False
    skip_existing: bool = False

    def kept(self) -> dict[str, Prediction]:
        """Read the captions in ``output`` that are to be kept, by the image names there."""
        if not self.skip_existing or self.output is None or not self.output.is_file():
            return {}
        found = read_predictions(self.output, self.layout)
        return {prediction.path: prediction for prediction in found if prediction.error is None}

    def needs(self, path: str, kept: Container[str]) -> bool:
        """True if any destination lacks the caption of an image."""
        if self.page or (self.output and name_in(path, self.layout) not in kept):
            return True
        if not self.output and not self.sidecar and not self.metadata:
            return True  # for standard output
        return self.needs_sidecar(path) or self.needs_description(path)

    def needs_sidecar(self, path: str) -> bool:
        """True if an image's text file is to be written."""
        text = Path(path).with_suffix(".txt")
        has_text = str(text) != path and text.exists() and text.stat().st_size > 0
        return self.sidecar and (self.overwrite or not has_text)

    def needs_description(self, path: str) -> bool:
        """True if an image's description is to be written."""
        try:
            return self.metadata and (self.overwrite or read_description(Path(path)) is None)
        except MetadataError:
            return True  # the write will report the error


@dataclass
class Outcome:
    """The results for all images.

    Attributes:
        failures: reason by path, for images that could not be read or written.
        passed_over: number of images that already have captions at every destination.
        resumed: number of images already captioned by an interrupted run.
    """

    failures: dict[str, str] = field(default_factory=dict)
    passed_over: int = 0
    resumed: int = 0


def caption_images(
    load: Callable[[int], Captioner],
    paths: Sequence[str],
    places: Destinations,
    search: SearchOptions,
    details: bool = False,
    sentence: bool = False,
    explain: bool = False,
    batch_size: int | None = None,
    model: str = "",
    fingerprint: str = "",
) -> Outcome:
    """Caption images and write the captions to every destination.

    Args:
        load: returns a captioner for a number of images; not called if there is nothing to do.
        paths: the images, each once.
        places: where captions go.
        search: how to search; a page has several captions per image unless the number is set.
        details: include each word's probability; a page always does.
        sentence, explain: see ``Captioner.stream``; the page shows the explanations.
        batch_size: images per batch, see ``Captioner.stream``.
        model: the model's name, for the page.
        fingerprint: a string that identifies the model files.

    Raises:
        UserError: a destination cannot be written, or ``output`` cannot be extended.
    """
    if places.metadata:
        check_available()
    kept = places.kept()
    wanted = [path for path in paths if places.needs(path, kept)]
    outcome = Outcome(passed_over=len(paths) - len(wanted))
    if not wanted:
        return outcome
    captioner = load(len(wanted))
    count = searched = search.num_captions or 1
    if places.page and search.num_captions is None:
        searched = min(PAGE_CAPTIONS, search.beam_size or PAGE_CAPTIONS)
    options = replace(search, num_captions=searched)
    config = asdict(captioner.search_config(options))
    with_words = details or places.page is not None
    owners = _sidecar_owners(paths)

    # A progress bar would garble captions that appear on the same terminal.
    quiet = places.output is None and sys.stdout.isatty()
    bar: dict[str, Any] = {"unit": "image", "desc": "captioning", "disable": quiet}

    def captioned(images: Sequence[str], done: Iterable[Prediction] = ()) -> Iterator[Prediction]:
        """Caption images, write text files and metadata, and note failures."""
        made = captioner.stream(
            images,
            options,
            batch_size=batch_size,
            details=with_words,
            sentence=sentence,
            explain=explain,
        )
        for prediction in progress_bar(chain(done, made), total=len(wanted), **bar):
            failure = prediction.error or _write_beside(prediction, count, places, owners)
            if failure is not None:
                outcome.failures[prediction.path] = failure
            yield prediction

    def select(prediction: Prediction) -> Prediction:
        """Leave out what only the page needs."""
        captions = prediction.captions[:count]
        if not details:
            captions = [replace(caption, words=(), score_parts={}) for caption in captions]
        return replace(prediction, captions=captions)

    target = places.output or places.page
    if target is None:
        write_predictions(map(select, captioned(wanted)), places.layout, None)
        return outcome
    settings = {"model": fingerprint, "search": config, "details": with_words, "sentence": sentence}
    if explain:
        settings["explain"] = True
    with PartialResults(target, settings) as results:
        done = [path for path in wanted if path in results]
        remaining = [path for path in wanted if path not in results]
        outcome.resumed = len(done)
        recorded = results.recorded(captioned(remaining, map(results.__getitem__, done)))
        if places.output is None:
            write_predictions(map(select, recorded), places.layout, None)
        else:
            for _ in recorded:
                pass
            new = ((path, select(results[path])) for path in wanted)
            write_predictions(_merge(new, paths, kept, places), places.layout, places.output)
        if places.page:
            facts = {"Model": model, "Search": describe_search(config)}
            _write_page(map(results.__getitem__, wanted), places.page, wanted, facts, places)
    return outcome


def _merge(
    new: Iterator[tuple[str, Prediction]],
    paths: Sequence[str],
    kept: Mapping[str, Prediction],
    places: Destinations,
) -> Iterator[Prediction]:
    """Yield kept predictions of other images, then kept and new ones in the order of ``paths``."""
    names = {path: name_in(path, places.layout) for path in paths}
    others = kept.keys() - names.values()
    yield from (prediction for name, prediction in kept.items() if name in others)
    following = next(new, None)
    for path, name in names.items():
        if following is not None and following[0] == path:
            yield following[1]
            following = next(new, None)
        elif name in kept:
            yield kept[name]


def _common_folder(paths: Iterable[str]) -> Path | None:
    """Return the innermost common folder of these paths; None if they are on several drives."""
    try:
        return Path(os.path.commonpath([Path(path).parent for path in paths]))
    except ValueError:  # or if some are absolute
        return None


def _write_page(
    predictions: Iterable[Prediction],
    page: Path,
    paths: Sequence[str],
    facts: dict[str, str],
    places: Destinations,
) -> None:
    """Write the gallery, titled after the images' common folder."""
    folder = _common_folder(paths)
    items = (_gallery_item(prediction, folder) for prediction in predictions)
    title = decodable(folder.resolve().name) if folder else ""
    facts = {**facts, "Date": time.strftime("%Y-%m-%d %H:%M")}
    write_gallery(items, page, title or "Captions", facts, places.thumbnails)


def _gallery_item(prediction: Prediction, folder: Path | None) -> GalleryItem:
    path = Path(prediction.path)
    name = str(path.relative_to(folder) if folder else path)
    return GalleryItem(path, decodable(name), prediction.captions, prediction.error)


def _sidecar_owners(paths: Iterable[str]) -> dict[Path, str]:
    """Map each text file to the first image that shares it (photo.jpg, photo.png)."""
    owners: dict[Path, str] = {}
    for path in paths:
        owners.setdefault(Path(path).with_suffix(".txt"), path)
    return owners


def _write_beside(
    prediction: Prediction, count: int, places: Destinations, owners: Mapping[Path, str]
) -> str | None:
    """Write an image's text file and description as requested; return the reason on failure."""
    path = prediction.path
    sidecar = Path(path).with_suffix(".txt")
    try:
        if places.sidecar and owners[sidecar] != path:
            return f"{sidecar.name} belongs to {decodable(Path(owners[sidecar]).name)}"
        if places.needs_sidecar(path):
            check_replaceable(sidecar)
            with atomic_write(sidecar) as handle:
                for caption in prediction.captions[:count]:
                    handle.write(f"{caption.text}\n")
        if places.needs_description(path):
            write_description(Path(path), prediction.captions[0].text)
    except (UserError, MetadataError) as error:
        return str(error)
    return None
