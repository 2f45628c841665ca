"""Caption images: files, folders with their sub-folders, patterns, and lists of paths.

The manual is in caption.py, the advice in its --help.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.decoding.options import CAPTIONS, SearchOptions
from pipeline.models.pretrained import BEST, PRETRAINED, is_pretrained, pretrained_path
from pipeline.outputs.inputs import collect
from pipeline.utils.errors import UserError
from pipeline.utils.files import check_writable, locked
from pipeline.utils.terminal import echo, echo_failure

if TYPE_CHECKING:
    from pipeline.captioner import Captioner

# The run folders of stages 3 and 2, the better one first.
DEFAULT_MODELS = (f"runs/joint/{BEST}", f"runs/decoder/{BEST}")
FORMATS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv"}
PAGE_CAPTIONS = 5

GROUPS = {
    "Where captions go": (
        *("layout", "output", "skip_existing", "sidecar", "write_metadata", "overwrite"),
        *("html", "thumbnails"),
    ),
    CAPTIONS: ("words",),
    "A page to drop images on": ("serve", "port"),
    "Model and machine": ("model", "weights", "device", "batch_size"),
}


@options.command(GROUPS)
@click.argument("images", nargs=-1)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A run folder or a checkpoint. Given several times, for runs that differ in their seed, "
    "the decoders caption as an ensemble.  [default: runs/joint, else runs/decoder, else "
    "'pretrained', the model that comes with the program]",
    show_default=False,
)
@options.weights
@options.from_dataclass(SearchOptions)
@click.option("--words", is_flag=True, help="Give each word's probability too, in json and jsonl.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["text", "json", "jsonl", "csv", "coco"]),
    default=None,
    help="text: path, tab, caption, and of several, tab, log-probability; jsonl: a line of JSON a "
    "image, as it is made; csv: for spreadsheets, with an apostrophe before what they would take "
    "for a formula; coco: the COCO results format.  [default: by the end of --output's "
    "name, else text]",
    show_default=False,
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="File to write instead of standard output; whole or not at all.",
)
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Keep the captions that --output has, and add those of images that it has not.",
)
@click.option(
    "--sidecar",
    is_flag=True,
    help="Write the caption to a text file beside each image as well: photo.jpg, photo.txt. "
    "Images that have one are passed over.",
)
@click.option(
    "--write-metadata",
    is_flag=True,
    help="Write the caption into each image's description as well (XMP, EXIF, IPTC); the pixels "
    "and all else stay as they are. Images that have one are passed over.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace text files and descriptions that are there.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    default=None,
    help="Write a page as well, with the images, their captions, and a search.",
)
@click.option(
    "--thumbnails",
    type=click.Choice(["inside", "beside"]),
    default="inside",
    help="Keep the page's small images inside it, or in a folder beside it: better for thousands.",
)
@click.option(
    "--serve",
    is_flag=True,
    help="Open a page in the browser, to drop images on and see their captions; it can be "
    "reached from this computer alone.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8321, help="Of that page; 0: any free one."
)
@options.device
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=None,
    help="Images at a time; changes the speed, not the captions.  [default: 4 on a CPU, 64 on a "
    "GPU]",
    show_default=False,
)
def main(
    images: tuple[str, ...],
    model: tuple[Path, ...],
    weights: str | None,
    words: bool,
    layout: str | None,
    output: Path | None,
    skip_existing: bool,
    sidecar: bool,
    write_metadata: bool,
    overwrite: bool,
    html: Path | None,
    thumbnails: str,
    serve: bool,
    port: int,
    device: str,
    batch_size: int | None,
    **search: Any,
) -> None:
    """Caption IMAGES: files, folders (with sub-folders), patterns such as '*.jpg', or - for a
    list of paths on standard input.

    \b
    Examples:
      python caption.py photos/
      python caption.py photos/ --output captions.csv
      python caption.py photos/ --html captions.html --thumbnails beside
      python caption.py photos/ --sidecar --write-metadata
      python caption.py a.jpg --num-captions 3 --diverse
      python caption.py a.jpg --temperature 0.7 --num-captions 5 --seed 1
      python caption.py a.jpg --prefix 'two dogs'
      find . -name '*.jpg' -print0 | python caption.py - --format jsonl
      python caption.py --serve

    Stopped at any moment, the same command goes on where it was, unless captions go to standard
    output alone.
    """
    search_options = SearchOptions(**search)
    _check(images, serve, skip_existing, output)
    if serve:
        from pipeline.serve.app import serve as serve_page

        models = model or (default_model(),)
        serve_page(_load(models, device, weights, 1), _name(models), port, open_browser=True)
        return
    for target in (output, html):
        if target is not None:
            check_writable(target)
    paths = collect(images)
    models = model or (default_model(),)
    from pipeline.outputs.caption_folder import Destinations, Request, caption_images
    from pipeline.outputs.formats import decodable

    places = Destinations(
        layout=layout or FORMATS.get(output.suffix.lower() if output else "", "text"),
        output=output,
        sidecar=sidecar,
        metadata=write_metadata,
        page=html,
        thumbnails=thumbnails,
        overwrite=overwrite,
        skip_existing=skip_existing,
    )
    request = Request(
        search=search_options,
        num_captions=search_options.num_captions or 1,
        page_captions=search_options.num_captions
        or min(PAGE_CAPTIONS, search_options.beam_size or PAGE_CAPTIONS),
        details=words,
        batch_size=batch_size,
        model=_name(models),
        fingerprint=_fingerprint(models),
    )
    for target in {target for target in (output, html) if target is not None}:
        click.get_current_context().with_resource(locked(target))
    try:
        outcome = caption_images(
            lambda images: _load(models, device, weights, images), paths, places, request
        )
    except KeyboardInterrupt:
        kept = output or html or sidecar or write_metadata
        echo("interrupted" + ("; the same command goes on" if kept else ""), err=True)
        sys.exit(130)
    if html is not None:
        echo(f"page: {html}", err=True)
    if outcome.resumed:
        echo(f"{outcome.resumed:,} were captioned before the interruption", err=True)
    if outcome.passed_over:
        echo(f"{outcome.passed_over:,} have captions already: passed over", err=True)
    for path, reason in outcome.failures.items():
        echo_failure(decodable(path), reason)
    if outcome.failures:
        echo(
            f"{len(outcome.failures):,} of {len(paths):,} images could not be read or written",
            err=True,
        )
        sys.exit(1)


def _check(
    images: Sequence[str],
    serve: bool,
    skip_existing: bool,
    output: Path | None,
) -> None:
    """Refuse what makes no sense together, before anything is loaded."""
    if not images and not serve:
        raise click.UsageError("name images or a folder of them, or use --serve")
    if images and serve:
        raise click.UsageError("--serve takes no images: they are dropped on its page")
    if skip_existing and output is None:
        raise UserError("--skip-existing: needs the --output to add to")


def _load(models: Sequence[Path], device: str, weights: str | None, images: int) -> Captioner:
    from pipeline.captioner import Captioner
    from pipeline.models.openvino import WORTH_COMPILING

    engine = "auto" if images >= WORTH_COMPILING else "torch"
    return Captioner.load(models, device, weights, engine=engine)


def _name(models: Sequence[Path]) -> str:
    return " + ".join(map(str, models))


def _fingerprint(models: Sequence[Path]) -> str:
    """Tell these model files from others, by size and time."""
    parts = []
    for model in models:
        path = pretrained_path() if is_pretrained(model) else model
        path = path / BEST if path.is_dir() else path
        if path.is_file():  # else loading says what is missing
            information = path.stat()
            parts.append(f"{information.st_size} {information.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def default_model() -> Path:
    """Find the model to use when none is named: the user's own, or else the one in the box."""
    for candidate in DEFAULT_MODELS:
        if Path(candidate).is_file():
            echo(f"model: {candidate}", err=True)
            return Path(candidate)
    echo(
        "model: the pretrained model (--model pretrained), trained on Flickr8k for "
        "research and education; see data/pretrained/MODEL_CARD.md",
        err=True,
    )
    return Path(PRETRAINED)
