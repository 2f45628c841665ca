"""Caption many images and put the captions where they are wanted: what caption.py does.

Text files and metadata that are there already stay as they are, unless they are to be overwritten;
an image is captioned if any place wants a caption for it. What goes into one file, written whole
at the end, is also noted in a journal, from which the same command goes on when it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.captioner import Captioner, Prediction
from pipeline.decoding.search import describe_search
from pipeline.outputs.formats import decodable, name_in, read_predictions, write_predictions
from pipeline.outputs.gallery import GalleryItem, write_gallery
from pipeline.outputs.metadata import (
    MetadataError,
    check_available,
    read_description,
    write_description,
)
from pipeline.outputs.resume import Journal
from pipeline.outputs.sidecars import has_sidecar, shared_sidecars, sidecar_path, write_sidecar
from pipeline.utils.errors import UserError
from pipeline.utils.progress import progress_bar


@dataclass(frozen=True)
class Destinations:
    """Where captions go.

    Attributes:
        layout: of the captions on standard output or in ``output``: see ``output.WRITERS``.
        output: a file instead of standard output.
        sidecar: also a text file beside each image.
        metadata: also the image's own description.
        page: also a page to look at.
        thumbnails: whether the page's small images are ``inside`` it or in a folder ``beside``.
        overwrite: replace text files and descriptions that are there.
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

    @property
    def beside(self) -> bool:
        """Whether captions go to places beside or inside the images."""
        return self.sidecar or self.metadata

    def beside_wants(self, path: str) -> bool:
        """Tell whether an image lacks a text file or a description that it should have."""
        image = Path(path)
        if self.sidecar and (self.overwrite or not has_sidecar(image)):
            return True
        try:
            return self.metadata and (self.overwrite or read_description(image) is None)
        except MetadataError:
            return True  # writing will say what is wrong


@dataclass(frozen=True)
class Request:
    """What is wanted for each image.

    Attributes:
        search: what ``Captioner.search_config`` takes, ``least`` left out.
        num_captions: captions an image.
        page_captions: captions an image on the page.
        details: each word's probability, too; a page has them always.
        batch_size: images a batch, see ``Captioner.stream``.
        model: its name, for the page.
        fingerprint: what tells it from other models.
    """

    search: Mapping[str, Any]
    num_captions: int = 1
    page_captions: int = 1
    details: bool = False
    batch_size: int | None = None
    model: str = ""
    fingerprint: str = ""


@dataclass
class Outcome:
    """What became of the images.

    Attributes:
        failures: path to reason, of what could not be read or written.
        passed_over: how many have captions in every place already.
        resumed: how many an interrupted run had captioned.
    """

    failures: dict[str, str] = field(default_factory=dict)
    passed_over: int = 0
    resumed: int = 0


def caption_images(
    load: Callable[[int], Captioner], paths: Sequence[str], places: Destinations, request: Request
) -> Outcome:
    """Caption images and write the captions everywhere they are wanted.

    Args:
        load: gives the captioner for so many images; not called where there is nothing to do.
        paths: the images, each once.
        places: where captions go.
        request: what captions.

    Raises:
        UserError: a place cannot be written, or ``output`` cannot be added to.
    """
    if places.metadata:
        check_available()
    kept = _kept(places)
    wanted = [path for path in paths if _is_wanted(path, places, kept)]
    outcome = Outcome(passed_over=len(paths) - len(wanted))
    if not wanted:
        return outcome
    captioner = load(len(wanted))
    count = max(request.num_captions, request.page_captions if places.page else 1)
    details = request.details or places.page is not None
    config = captioner.search_config(**request.search, least=count)
    target = places.output or places.page
    settings = {
        "model": request.fingerprint,
        "search": asdict(config),
        "captions": count,
        "details": details,
    }
    journal = Journal(target, settings) if target else None
    known: Mapping[str, Prediction] = {} if journal is None else journal
    remaining = [path for path in wanted if path not in known]
    outcome.resumed = len(wanted) - len(remaining)
    made = captioner.stream(remaining, config, count, request.batch_size, details=details)
    taken = shared_sidecars(paths) if places.sidecar else {}
    unreadable: dict[str, str] = {}

    def captioned() -> Iterator[Prediction]:
        """Give the wanted images in their order, each written beside and noted."""
        # A bar would run through captions that appear on the same terminal.
        quiet = places.output is None and sys.stdout.isatty()
        for path in progress_bar(wanted, unit="image", desc="captioning", disable=quiet):
            whole = known[path] if path in known else next(made)
            prediction = _as_requested(whole, request)
            if prediction.error is not None:
                outcome.failures[path] = unreadable[path] = prediction.error
            else:
                failure = _write_beside(prediction, places, taken)
                if failure is not None:
                    outcome.failures[path] = failure
                if journal is not None and path not in known:
                    journal.add(whole)
            yield prediction

    joined = _joined(captioned(), paths, set(wanted), kept, places.layout)
    write_predictions(joined, places.layout, places.output)
    if places.page:
        # From the journal, one by one: in memory they would grow with the images.
        items = (
            GalleryItem(
                Path(path),
                decodable(path),
                [] if path in unreadable else known[path].captions,
                unreadable.get(path),
            )
            for path in wanted
        )
        facts = {"model": request.model, "search": describe_search(asdict(config))}
        write_gallery(items, places.page, "Captions", facts, places.thumbnails)
    if journal is not None:
        journal.finish()
    return outcome


def _kept(places: Destinations) -> dict[str, Prediction]:
    """Read the captions that ``output`` has and is to keep, by the names that it gives."""
    if not places.skip_existing or places.output is None or not places.output.is_file():
        return {}
    found = read_predictions(places.output, places.layout)
    return {prediction.path: prediction for prediction in found if prediction.error is None}


def _is_wanted(path: str, places: Destinations, kept: Mapping[str, Prediction]) -> bool:
    name = name_in(path, places.layout)
    if places.page or (name not in kept and (places.output or not places.beside)):
        return True
    return places.beside_wants(path)


def _as_requested(prediction: Prediction, request: Request) -> Prediction:
    """Leave out what only a page needs."""
    captions = prediction.captions[: request.num_captions]
    if not request.details:
        captions = [replace(caption, words=()) for caption in captions]
    return replace(prediction, captions=captions)


def _joined(
    captioned: Iterator[Prediction],
    paths: Sequence[str],
    wanted: Collection[str],
    kept: Mapping[str, Prediction],
    layout: str,
) -> Iterator[Prediction]:
    """Put what is captioned now in one order with what is kept: first what was not asked for."""
    names = {path: name_in(path, layout) for path in paths}
    listed = set(names.values())
    yield from (prediction for name, prediction in kept.items() if name not in listed)
    for path in paths:
        if path in wanted:
            yield next(captioned)
        elif names[path] in kept:
            yield kept[names[path]]


def _write_beside(
    prediction: Prediction, places: Destinations, taken: Mapping[str, str]
) -> str | None:
    """Write an image's text file and description, where wanted; returns why that failed."""
    image = Path(prediction.path)
    try:
        if places.sidecar and prediction.path in taken:
            name = sidecar_path(image).name
            return f"{name} belongs to {decodable(Path(taken[prediction.path]).name)}"
        if places.sidecar and (places.overwrite or not has_sidecar(image)):
            write_sidecar(image, prediction.captions)
        if places.metadata and (places.overwrite or read_description(image) is None):
            write_description(image, prediction.captions[0].text)
    except (UserError, MetadataError) as error:
        return str(error)
    return None
