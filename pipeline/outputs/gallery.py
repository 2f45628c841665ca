"""One HTML page of captioned images to browse, search, sort and share.

The page needs no network: style, script and data are embedded, its content security policy allows
only those and the images next to it, and names and captions are never treated as markup.
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
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from PIL import Image

from pipeline.datasets.images import ImageError, ImageRef, load_image, opened
from pipeline.decoding.captions import Caption
from pipeline.utils.cores import available_cores
from pipeline.utils.files import (
    atomic_write,
    cannot_be_written,
    check_writable,
    temporary_path,
)
from pipeline.utils.html import environment, read_asset, tidy
from pipeline.utils.threads import prefetch

THUMBNAIL_SIDE = 320  # pixels on the long side
THUMBNAIL_QUALITY = 78
# Pillow's names of the formats that every browser shows. For others (TIFF, JPEG 2000) the page
# enlarges the thumbnail.
SHOWN_BY_BROWSERS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP"})
# File names of thumbnails beside a page; nothing else is ever deleted there.
THUMBNAIL_NAME = re.compile(r"[0-9a-f]{32}\.webp")
SURROGATES = re.compile("[\ud800-\udfff]")  # bytes of a name that are not UTF-8


@dataclass(frozen=True)
class GalleryItem:
    """One image of the page.

    Attributes:
        path: the image file. The page shows an empty frame for one that cannot be read.
        name: the name shown on the page.
        captions: best first.
        error: why there are no captions, else None; such an image is listed, not shown.
        references: human-written captions.
        score: CIDEr-D of the best caption, in percent, if there are references.
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
    tiles: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Write ``items`` to the HTML file ``target``, replacing an earlier one.

    An image opens as the original file, by a URL relative to the page, if browsers can show it;
    otherwise as its thumbnail. Memory use does not grow with the number of items. If iterating over
    them raises, an earlier page is left unchanged.

    Args:
        items: the images; sorting the page keeps their order among equals.
        target: the page.
        title: its heading.
        facts: names and values to show, such as the search; ``Model`` and ``Date`` are also the
            subtitle.
        thumbnails: ``inside`` makes a self-contained page, about 15 kB per image; ``beside``
            writes them to the folder NAME_files, and the page opens instantly.
        tiles: figures to show at the top: name, value, and a note below it.

    Raises:
        UserError: the page or its folder cannot be written.
    """
    check_writable(target)
    folder = target.with_name(f"{target.stem}_files")
    workers = min(8, available_cores())
    thumbnailed = prefetch(_thumbnailed, items, workers, ahead=4 * workers)
    names: set[str] = set()

    def records() -> Iterator[dict[str, Any]]:
        for item, thumbnail, missing in thumbnailed:
            source = None
            if thumbnail is not None and thumbnails == "inside":
                source = data_uri(thumbnail)
            elif thumbnail is not None:
                name = _write_thumbnail(thumbnail, folder)
                names.add(name)
                source = f"{_quoted(folder.name)}/{name}"
            yield _record(item, target, source, thumbnail, missing)

    try:
        with atomic_write(target) as handle:
            handle.writelines(_page(title, facts, tiles, records()))
    finally:
        thumbnailed.close()  # type: ignore[attr-defined]
    _delete_thumbnails(folder, keep=names)


def _write_thumbnail(thumbnail: Thumbnail, folder: Path) -> str:
    """Write a thumbnail beside a page; return the name of its file."""
    # Named by content hash, so that an old page keeps its thumbnails until it is replaced.
    name = f"{hashlib.sha256(thumbnail.content).hexdigest()[:32]}.webp"
    path = folder / name
    if not path.is_file():
        # Without the fsync of atomic_write, which would take longer than everything else.
        temporary = temporary_path(path)
        try:
            folder.mkdir(exist_ok=True)
            temporary.write_bytes(thumbnail.content)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise cannot_be_written(path, error) from error
    return name


def _delete_thumbnails(folder: Path, keep: set[str]) -> None:
    """Delete thumbnails of earlier pages, and the folder if it is then empty."""
    if folder.is_dir():
        for path in folder.iterdir():
            if THUMBNAIL_NAME.fullmatch(path.name) and path.name not in keep:
                path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def confidence(caption: Caption) -> float | None:
    """Return the geometric mean of the token probabilities, <end> included; None if not finite."""
    tokens = 1 + (len(caption.words) or len(caption.text.split()))
    mean = caption.log_probability / tokens
    return math.exp(min(0.0, mean)) if math.isfinite(mean) else None


def relative_url(path: Path, page: Path) -> str | None:
    """Return the address of ``path`` relative to ``page``; None on another drive (Windows)."""
    try:
        return _quoted(os.path.relpath(path, page.parent))
    except ValueError:
        return None


def _quoted(path: str) -> str:
    # As bytes, for names that are not UTF-8. ":" is quoted too: "a:b.jpg" would name a scheme.
    return quote(os.fsencode(path.replace(os.sep, "/")), safe="/")


def _thumbnailed(item: GalleryItem) -> tuple[GalleryItem, Thumbnail | None, str | None]:
    """Return an item with its thumbnail, or with the reason why it has none."""
    if item.error is not None:
        return item, None, None
    try:
        return item, make_thumbnail(item.path), None
    except ImageError as error:
        return item, None, str(error)


def make_thumbnail(path: ImageRef, side: int = THUMBNAIL_SIDE) -> Thumbnail:
    """Scale an image to ``side`` pixels on its long side; smaller ones keep their size.

    Raises:
        ImageError: see ``images.load_image``.
    """
    image = load_image(path, side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=THUMBNAIL_QUALITY, method=2)
    with opened(path) as original:
        shown = original.format in SHOWN_BY_BROWSERS
    return Thumbnail(content.getvalue(), image.width, image.height, shown)


def data_uri(thumbnail: Thumbnail) -> str:
    """Return a thumbnail as a data URI for an image element."""
    return "data:image/webp;base64," + base64.b64encode(thumbnail.content).decode("ascii")


def _record(
    item: GalleryItem,
    target: Path,
    source: str | None,
    thumbnail: Thumbnail | None,
    missing: str | None,
) -> dict[str, Any]:
    """Describe an item for the page's script."""
    shown = thumbnail is not None and thumbnail.original_shown
    return {
        "name": _text(item.name),
        "captions": [
            {
                "text": _text(caption.text),
                "logProbability": _number(caption.log_probability),
                "confidence": _number(confidence(caption)),
                "words": [
                    [_text(word.text), _number(word.probability), *_shades(word.cells)]
                    for word in caption.words
                ],
                "parts": {n: _number(part) for n, part in caption.score_parts.items()},
            }
            for caption in item.captions
        ],
        "references": [_text(tidy(reference)) for reference in item.references],
        "score": _number(item.score),
        "error": None if item.error is None else _text(item.error),
        "missing": None if missing is None else _text(missing),
        "thumbnail": source,
        "width": thumbnail.width if thumbnail else None,
        "height": thumbnail.height if thumbnail else None,
        "original": relative_url(item.path, target) if shown else None,
    }


def _shades(cells: Sequence[float]) -> list[list[int]]:
    """Return a list of cells in percent of the largest; an empty list if there are no cells.

    Cells that are evidence against a word become 0.
    """
    most = max([1e-9, *cells])
    return [[round(100 * max(0.0, cell) / most) for cell in cells]] if cells else []


def _text(text: str) -> str:
    return SURROGATES.sub("\ufffd", text)


def _number(value: float | None) -> float | None:
    """Round to 5 digits; None for infinities and NaN, which JSON lacks."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _page(
    title: str,
    facts: Mapping[str, str],
    tiles: Sequence[tuple[str, str, str]],
    records: Iterable[Mapping[str, Any]],
) -> Iterator[str]:
    """Fill in the template, streaming the records one by one."""
    style, script = read_asset("base.css", "gallery.css"), read_asset("words.js", "gallery.js")
    return (
        environment()
        .get_template("gallery.html")
        .generate(
            title=_text(title),
            facts={_text(name): _text(value) for name, value in facts.items()},
            tiles=tiles,
            records=records,
            style=Markup(style),
            script=Markup(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
        )
    )


def _hash(content: str) -> str:
    """Return the source expression that allows this content in a content security policy."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
