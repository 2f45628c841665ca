"""Caption many images and write the captions where they are wanted: what caption.py does.

Existing text files and metadata stay as they are unless they are to be overwritten; an image is
captioned if any destination needs its caption. Captions for a file are recorded one by one
(``resume``), and the file is written from the records at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from pipeline.outputs.sidecars import has_sidecar, shared_sidecars, sidecar_path, write_sidecar
from pipeline.utils.errors import UserError
from pipeline.utils.progress import progress_bar


@dataclass(frozen=True)
class Destinations:
    """Where captions go.

    Attributes:
        layout: format on standard output or in ``output``: a key of ``formats.WRITERS``.
        output: a file instead of standard output.
        sidecar: write a text file beside each image as well.
        metadata: write the description in each image's metadata as well.
        page: write a gallery page as well.
        thumbnails: the page's small images are ``inside`` it or in a folder ``beside`` it.
        overwrite: replace existing text files and descriptions.
        skip_existing: keep the captions that ``output`` has, and add to them.
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
        """Read the captions that ``output`` has and is to keep, by the names in it."""
        if not self.skip_existing or self.output is None or not self.output.is_file():
            return {}
        found = read_predictions(self.output, self.layout)
        return {prediction.path: prediction for prediction in found if prediction.error is None}

    def needs(self, path: str, kept: Mapping[str, Prediction]) -> bool:
        """True if any destination lacks the caption of an image."""
        if self.page or (self.output and name_in(path, self.layout) not in kept):
            return True
        if not self.output and not self.sidecar and not self.metadata:
            return True  # for standard output
        return self.needs_sidecar(path) or self.needs_description(path)

    def needs_sidecar(self, path: str) -> bool:
        """True if an image's text file is to be written."""
        return self.sidecar and (self.overwrite or not has_sidecar(Path(path)))

    def needs_description(self, path: str) -> bool:
        """True if an image's description is to be written."""
        try:
            return self.metadata and (self.overwrite or read_description(Path(path)) is None)
        except MetadataError:
            return True  # writing it reports the error


@dataclass(frozen=True)
class Request:
    """What is wanted for each image.

    Attributes:
        search: how to search; ``num_captions`` of it is set here.
        num_captions: captions per image.
        page_captions: captions per image on the page.
        details: each word's probability, too; a page always has them.
        batch_size: images per batch, see ``Captioner.stream``.
        model: its name, for the page.
        fingerprint: a string that differs for other model files.
    """

    search: SearchOptions
    num_captions: int = 1
    page_captions: int = 1
    details: bool = False
    batch_size: int | None = None
    model: str = ""
    fingerprint: str = ""

    def select(self, prediction: Prediction) -> Prediction:
        """Leave out what only the page needs."""
        captions = prediction.captions[: self.num_captions]
        if not self.details:
            captions = [replace(caption, words=()) for caption in captions]
        return replace(prediction, captions=captions)


@dataclass
class Outcome:
    """What became of the images.

    Attributes:
        failures: path to reason, of images that could not be read or written.
        passed_over: number of images that have captions at every destination already.
        resumed: number of images that an interrupted run had captioned.
    """

    failures: dict[str, str] = field(default_factory=dict)
    passed_over: int = 0
    resumed: int = 0


def caption_images(
    load: Callable[[int], Captioner], paths: Sequence[str], places: Destinations, request: Request
) -> Outcome:
    """Caption images and write the captions to every destination.

    Args:
        load: returns the captioner for this many images; not called if there is nothing to do.
        paths: the images, each once.
        places: where captions go.
        request: which captions.

    Raises:
        UserError: a destination cannot be written, or ``output`` cannot be added to.
    """
    if places.metadata:
        check_available()
    kept = places.kept()
    wanted = [path for path in paths if places.needs(path, kept)]
    outcome = Outcome(passed_over=len(paths) - len(wanted))
    if not wanted:
        return outcome
    captioner = load(len(wanted))
    count = max(request.num_captions, request.page_captions if places.page else 1)
    details = request.details or places.page is not None
    options = replace(request.search, num_captions=count)
    config = captioner.search_config(options)
    taken = shared_sidecars(paths) if places.sidecar else {}

    def stream(images: Sequence[str]) -> Iterator[Prediction]:
        return captioner.stream(images, options, batch_size=request.batch_size, details=details)

    def deliver(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Write text files and metadata, note failures, and pass the predictions on."""
        # A progress bar would run through captions that appear on the same terminal.
        quiet = places.output is None and sys.stdout.isatty()
        bar: dict[str, Any] = {"unit": "image", "desc": "captioning", "disable": quiet}
        for prediction in progress_bar(predictions, total=len(wanted), **bar):
            failure = prediction.error or _write_beside(prediction, request, places, taken)
            if failure is not None:
                outcome.failures[prediction.path] = failure
            yield prediction

    target = places.output or places.page
    if target is None:
        write_predictions(map(request.select, deliver(stream(wanted))), places.layout, None)
        return outcome
    search = asdict(config)
    settings = {"model": request.fingerprint, "search": search, "captions": count}
    with PartialResults(target, {**settings, "details": details}) as results:
        done = [path for path in wanted if path in results]
        remaining = [path for path in wanted if path not in results]
        outcome.resumed = len(done)
        predictions = deliver(chain(map(results.__getitem__, done), stream(remaining)))
        recorded = map(request.select, results.recorded(predictions))
        if places.output is None:
            write_predictions(recorded, places.layout, None)
        else:
            for _ in recorded:
                pass
            new = ((path, request.select(results[path])) for path in wanted)
            merged = _merge(new, paths, kept, places.layout)
            write_predictions(merged, places.layout, places.output)
        if places.page:
            facts = {"model": request.model, "search": describe_search(search)}
            items = (_gallery_item(results[path]) for path in wanted)
            write_gallery(items, places.page, "Captions", facts, places.thumbnails)
    return outcome


def _merge(
    new: Iterator[tuple[str, Prediction]],
    paths: Sequence[str],
    kept: Mapping[str, Prediction],
    layout: str,
) -> Iterator[Prediction]:
    """Yield new and kept predictions in the order of ``paths``, after kept ones of other images."""
    names = {path: name_in(path, layout) for path in paths}
    others = kept.keys() - names.values()
    yield from (prediction for name, prediction in kept.items() if name in others)
    following = next(new, None)
    for path, name in names.items():
        if following is not None and following[0] == path:
            yield following[1]
            following = next(new, None)
        elif name in kept:
            yield kept[name]


def _gallery_item(prediction: Prediction) -> GalleryItem:
    path = prediction.path
    return GalleryItem(Path(path), decodable(path), prediction.captions, prediction.error)


def _write_beside(
    prediction: Prediction, request: Request, places: Destinations, taken: Mapping[str, str]
) -> str | None:
    """Write an image's text file and description where wanted; return why that failed."""
    path, image = prediction.path, Path(prediction.path)
    try:
        if places.sidecar and path in taken:
            return f"{sidecar_path(image).name} belongs to {decodable(Path(taken[path]).name)}"
        if places.needs_sidecar(path):
            write_sidecar(image, prediction.captions[: request.num_captions])
        if places.needs_description(path):
            write_description(image, prediction.captions[0].text)
    except (UserError, MetadataError) as error:
        return str(error)
    return None
