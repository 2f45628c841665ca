"""One HTML page of captioned images: to look through, search, sort and send.

The page asks the network for nothing: style, script and data are inside it, its content security
policy allows only those and images beside it, and names and captions never are markup.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline.datasets.images import ImageError, load_image, opened, prefetch
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write, check_writable, temporary_path

if TYPE_CHECKING:
    from jinja2 import Template

    from pipeline.decoding.captions import Caption

THUMBNAIL_SIDE = 320  # pixels on the long side
THUMBNAIL_QUALITY = 78
# What every browser draws; the names are Pillow's. Of others (TIFF, JPEG 2000) the page shows the
# thumbnail in large.
SHOWN_BY_BROWSERS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP"})
# The names that thumbnails beside a page have, so that nothing else is ever deleted there.
THUMBNAIL_NAME = re.compile(r"[0-9a-f]{32}\.webp")
SURROGATES = re.compile("[\ud800-\udfff]")  # bytes of a name that are no UTF-8
THUMBNAIL_PLACES = ("inside", "beside")


@dataclass(frozen=True)
class GalleryItem:
    """One image of the page.

    Attributes:
        path: the image file. One that cannot be read leaves an empty frame.
        name: what the image is called on the page.
        captions: best first.
        error: why there are no captions, else None; such an image is listed, not shown.
        references: what people said of the image.
        score: CIDEr-D of the best caption, in percent, where there are references.
    """

    path: Path
    name: str
    captions: Sequence[Caption]
    error: str | None = None
    references: Sequence[str] = ()
    score: float | None = None


@dataclass(frozen=True)
class Thumbnail:
    """A small image: WebP bytes, its sides in pixels, and whether browsers show the original."""

    content: bytes
    width: int
    height: int
    original_shown: bool


def write_gallery(
    items: Iterable[GalleryItem],
    target: Path,
    title: str,
    facts: Mapping[str, str],
    thumbnails: str = "inside",
    full_size: bool = True,
) -> None:
    """Write ``items`` to the HTML file ``target``, in the place of an earlier one.

    Items are taken as they come, and a few threads make thumbnails ahead, so memory does not grow
    with their number. If the stream raises, an earlier page is left as it was.

    Args:
        items: the images, in the order that is kept where others are equal.
        target: the page.
        title: its heading.
        facts: what else is to be known: model, search, date, scores.
        thumbnails: ``inside`` makes a page that can be sent alone, of some 15 kB an image;
            ``beside`` puts them into the folder NAME_files and makes a page that opens at once.
        full_size: whether an image opens as its own file, found from the page by a relative
            address, if browsers can show it; else as its thumbnail.

    Raises:
        UserError: the page or its folder cannot be written.
        ValueError: ``thumbnails`` is neither ``inside`` nor ``beside``.
    """
    if thumbnails not in THUMBNAIL_PLACES:
        raise ValueError(f"thumbnails: {thumbnails!r} is none of {', '.join(THUMBNAIL_PLACES)}")
    check_writable(target)
    folder = ThumbnailFolder(target.with_name(f"{target.stem}_files"))
    workers = min(8, os.cpu_count() or 1)
    drawn = prefetch(_drawn, items, workers, ahead=4 * workers)

    def records() -> Iterator[dict[str, Any]]:
        for item, thumbnail, missing in drawn:
            source = None
            if thumbnail is not None:
                inside = thumbnails == "inside"
                source = _data_uri(thumbnail) if inside else folder.add(thumbnail)
            yield _record(item, target, source, thumbnail, missing, full_size)

    try:
        with atomic_write(target) as handle:
            for part in _page(title, facts, records()):
                handle.write(part)
    except BaseException:
        drawn.close()  # type: ignore[attr-defined]
        folder.restore()
        raise
    folder.clean()


class ThumbnailFolder:
    """The thumbnails beside a page.

    A file is called by a hash of its content. So an old page and its successor share the folder,
    and whichever stands under the page's name finds what it shows, at every moment.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()  # of this page
        self.new: set[str] = set()  # that no earlier page had

    def add(self, thumbnail: Thumbnail) -> str:
        """Keep a thumbnail; return its address relative to the page."""
        name = f"{hashlib.sha256(thumbnail.content).hexdigest()[:32]}.webp"
        path = self.path / name
        if name not in self.names and not path.is_file():
            # Without the flush to the disk of atomic_write, which would take longer than all else.
            temporary = temporary_path(path)
            try:
                self.path.mkdir(exist_ok=True)
                temporary.write_bytes(thumbnail.content)
                temporary.replace(path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                reason = error.strerror or error
                raise UserError(f"{path}: cannot be written ({reason})") from error
            self.new.add(name)
        self.names.add(name)
        return f"{_quoted(self.path.name)}/{name}"

    def restore(self) -> None:
        """Take back what was added."""
        self._delete(self.new)

    def clean(self) -> None:
        """Delete what earlier pages left; files of others are not touched."""
        if self.path.is_dir():
            found = {p.name for p in self.path.iterdir() if THUMBNAIL_NAME.fullmatch(p.name)}
            self._delete(found - self.names)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()


def confidence(caption: Caption) -> float | None:
    """Give the geometric mean of the probabilities of a caption's tokens, the end among them.

    None where the log-probability is no number.
    """
    tokens = 1 + (len(caption.words) or len(caption.text.split()))
    mean = caption.log_probability / tokens
    return math.exp(min(0.0, mean)) if math.isfinite(mean) else None


def relative_url(path: Path, page: Path) -> str | None:
    """Give the address of ``path`` as seen from ``page``; None on another drive (Windows)."""
    try:
        relative = os.path.relpath(path, page.parent)
    except ValueError:
        return None
    return _quoted(relative)


def _quoted(path: str) -> str:
    # As bytes: a name need not be UTF-8. ":" too, as "a:b.jpg" would name a scheme.
    return quote(os.fsencode(path.replace(os.sep, "/")), safe="/")


def _drawn(item: GalleryItem) -> tuple[GalleryItem, Thumbnail | None, str | None]:
    """Make the thumbnail of an item, or say why there is none."""
    if item.error is not None:
        return item, None, None
    try:
        return item, make_thumbnail(item.path), None
    except ImageError as error:
        return item, None, str(error)


def make_thumbnail(path: Path, side: int = THUMBNAIL_SIDE) -> Thumbnail:
    """Draw an image with ``side`` pixels on its long side; smaller ones are left as they are.

    Raises:
        ImageError: see ``images.load_image``.
    """
    from PIL import Image

    image = load_image(path, side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=THUMBNAIL_QUALITY, method=2)
    with opened(path) as original:
        shown = original.format in SHOWN_BY_BROWSERS
    return Thumbnail(content.getvalue(), image.width, image.height, shown)


def _data_uri(thumbnail: Thumbnail) -> str:
    return "data:image/webp;base64," + base64.b64encode(thumbnail.content).decode("ascii")


def _record(
    item: GalleryItem,
    target: Path,
    source: str | None,
    thumbnail: Thumbnail | None,
    missing: str | None,
    full_size: bool,
) -> dict[str, Any]:
    """Describe an item for the page's script."""
    shown = full_size and thumbnail is not None and thumbnail.original_shown
    return {
        "name": _text(item.name),
        "captions": [
            {
                "text": _text(caption.text),
                "logProbability": _number(caption.log_probability),
                "confidence": _number(confidence(caption)),
                "words": [[_text(word.text), _number(word.probability)] for word in caption.words],
            }
            for caption in item.captions
        ],
        "references": [_text(reference) for reference in item.references],
        "score": _number(item.score),
        "error": None if item.error is None else _text(item.error),
        "missing": None if missing is None else _text(missing),
        "thumbnail": source,
        "width": thumbnail.width if thumbnail else None,
        "height": thumbnail.height if thumbnail else None,
        "original": relative_url(item.path, target) if shown else None,
    }


def _text(text: str) -> str:
    return SURROGATES.sub("\ufffd", text)


def _number(value: float | None) -> float | None:
    """Round for the page; JSON has neither infinities nor NaN."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _page(
    title: str, facts: Mapping[str, str], records: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """Fill the template; the records pass through one by one."""
    from markupsafe import Markup

    template, style, script = _template()
    yield from template.generate(
        title=_text(title),
        facts={_text(name): _text(value) for name, value in facts.items()},
        records=records,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _template() -> tuple[Template, str, str]:
    """Load the page's template, its style and its script."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("pipeline")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    style, script = (
        loader.get_source(environment, name)[0] for name in ("gallery.css", "gallery.js")
    )
    return environment.get_template("gallery.html"), style, script


def _hash(content: str) -> str:
    """Name content in a content security policy, which then allows it and nothing else."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
