"""Caption images: files, folders with their sub-folders, patterns, and lists of paths."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.datasets.find_images import describe_skipped
from pipeline.decoding.options import CAPTIONS, SearchOptions, option_words
from pipeline.models.pretrained import checkpoint_path
from pipeline.outputs.inputs import Inputs, collect
from pipeline.utils.errors import UserError
from pipeline.utils.files import PAGE, PREDICTIONS, locked
from pipeline.utils.terminal import echo, echo_failure

if TYPE_CHECKING:
    from pipeline.captioner import Captioner
    from pipeline.outputs.caption_folder import Outcome

FORMATS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv"}

GROUPS = {
    "Output": (
        "layout",
        "output",
        "skip_existing",
        "sidecar",
        "write_metadata",
        "overwrite",
        "html",
        "thumbnails",
        "explain",
    ),
    "Model and machine": ("model", "ensemble", "weights", "device", "batch_size"),
    "Local page": ("serve", "port"),
    CAPTIONS: ("sentence", "words"),
}


@options.command(GROUPS)
@click.argument("images", nargs=-1)
@options.path(
    "--model",
    "A run folder or a checkpoint; with --ensemble several, each with --model.  [default: "
    "runs/joint, else runs/decoder, else 'pretrained', the model that comes with the program]",
    multiple=True,
)
@options.ensemble
@options.weights
@options.from_dataclass(SearchOptions)
@click.option(
    "--sentence",
    is_flag=True,
    help="Write captions as sentences, with a capital letter and a period, everywhere.",
)
@click.option(
    "--words", is_flag=True, help="Write each word's probability as well, in json and jsonl."
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["text", "json", "jsonl", "csv", "coco"]),
    help="text: path, tab, caption, and with several captions, tab, log-probability; jsonl: one "
    "line of JSON per image, written as it is captioned; csv: for spreadsheets, with an apostrophe "
    "before anything that they would take for a formula; coco: the COCO results format.  "
    "[default: by the suffix of --output, else text]",
)
@options.output(
    "--output",
    "File to write instead of standard output. It is replaced as a whole when all is done.",
    PREDICTIONS,
)
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Keep the captions in --output, and add those of images that are not in it. "
    "--sidecar and --write-metadata do so by themselves.",
)
@click.option(
    "--sidecar",
    is_flag=True,
    help="Also write the caption to a text file beside each image: photo.jpg, photo.txt. "
    "Images that have such a file are skipped.",
)
@click.option(
    "--write-metadata",
    is_flag=True,
    help="Also write the caption into each image's description (XMP, EXIF, IPTC); the pixels "
    "and all other metadata stay as they are. Images that have a description are skipped.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="With --sidecar and --write-metadata: replace existing text files and descriptions.",
)
@options.output("--html", "Also write a page with the images, their captions, and a search.", PAGE)
@click.option(
    "--thumbnails",
    type=click.Choice(["inside", "beside"]),
    default="inside",
    help="Keep the page's small images inside it, or in a folder beside it: better for thousands.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="On the page, pointing at a word shows which parts of the image speak for it.",
)
@click.option(
    "--serve",
    is_flag=True,
    help="Open a page in the browser to drop images on and see their captions. Only this computer "
    "can reach it.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8321,
    help="Port of the --serve page; 0: any free port.",
)
@options.device
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images per batch; changes the speed, not the captions.  [default: 4 on a CPU, 64 on a "
    "GPU]",
)
def main(
    images: tuple[str, ...],
    model: tuple[Path, ...],
    ensemble: bool,
    weights: str | None,
    sentence: bool,
    words: bool,
    layout: str | None,
    output: Path | None,
    skip_existing: bool,
    sidecar: bool,
    write_metadata: bool,
    overwrite: bool,
    html: Path | None,
    thumbnails: str,
    explain: bool,
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

    After an interruption the same command continues where it stopped, unless captions go to
    standard output alone.
    """
    search_options = SearchOptions(**search)
    layout = layout or FORMATS.get(output.suffix.lower() if output else "", "text")
    _check(search_options, layout)
    options.check_ensemble(model, ensemble)
    inputs = Inputs() if serve else collect(images)
    _check_targets(output, html, inputs.paths)
    models = model or (options.default_model(),)
    fingerprint = _fingerprint(models)
    name = " + ".join(map(str, models))
    load = functools.partial(_load, models, device, weights)
    if serve:
        from pipeline.serve.app import serve as serve_page

        serve_page(load(1), name, port, open_browser=True)
        return
    from pipeline.outputs.caption_folder import Destinations, caption_images

    destinations = Destinations(
        layout=layout,
        output=output,
        sidecar=sidecar,
        metadata=write_metadata,
        page=html,
        thumbnails=thumbnails,
        overwrite=overwrite,
        skip_existing=skip_existing,
    )
    for target in filter(None, {output, html}):
        click.get_current_context().with_resource(locked(target))
    try:
        outcome = caption_images(
            load,
            inputs.paths,
            destinations,
            search_options,
            details=words,
            sentence=sentence,
            explain=explain,
            batch_size=batch_size,
            model=name,
            fingerprint=fingerprint,
        )
    except KeyboardInterrupt:
        kept = output or html or sidecar or write_metadata
        echo("interrupted" + ("; run the same command to resume" if kept else ""), err=True)
        sys.exit(130)
    _report(outcome, output, html, inputs)


def _check(search: SearchOptions, layout: str) -> None:
    """Refuse options that contradict each other or have no effect, before anything is loaded."""
    given = click.get_current_context().params
    serve, images = given["serve"], given["images"]
    if not images and not serve:
        raise click.UsageError("name images or a folder of them, or use --serve")
    if images and serve:
        raise click.UsageError("--serve takes no images: they are dropped on its page")
    if serve and search != SearchOptions():
        words = ", ".join(option_words(search))
        raise UserError(f"--serve: takes no search options ({words}); its page has its own")
    if serve:
        others = given.keys() - {"serve", "port", "model", "ensemble", "weights", "device"}
        options.refuse_given([*others], "has no effect with --serve")
    else:
        options.refuse_given(["port"], "is for --serve")
    if not search.sampling:
        options.refuse_given(["seed"], "is for --temperature and --top-p")
    beside = given["sidecar"] or given["write_metadata"]
    if given["skip_existing"] and given["output"] is None and not beside:
        raise UserError("--skip-existing: needs --output, --sidecar or --write-metadata")
    if given["skip_existing"] and given["overwrite"]:
        raise UserError("--skip-existing and --overwrite: contradict each other; choose one")
    if given["overwrite"] and not beside:
        raise UserError("--overwrite: is for --sidecar and --write-metadata")
    if given["html"] is None:
        options.refuse_given(["thumbnails", "explain"], "is for the page of --html")
    if given["words"] and layout not in ("json", "jsonl"):
        raise UserError(f"--words: is for json and jsonl, not for {layout}; add --format jsonl")


def _check_targets(output: Path | None, html: Path | None, images: Sequence[str]) -> None:
    """Refuse an output file that is one of the images, or two that are the same file."""
    if output is not None and html is not None and output.resolve() == html.resolve():
        raise UserError(f"--output and --html: both are {output}; name two files")
    for target in (output, html):
        if target is not None and target.is_file():
            same_name = (image for image in images if Path(image).name == target.name)
            if any(target.samefile(image) for image in same_name if Path(image).exists()):
                raise UserError(f"{target}: is one of the images; name another file to write")


def _report(outcome: Outcome, output: Path | None, page: Path | None, inputs: Inputs) -> None:
    """Report what was done; exit with code 1 if images failed."""
    from pipeline.outputs.formats import decodable

    if inputs.skipped:
        echo(describe_skipped(inputs.skipped), err=True)
    for what, target in (("captions", output), ("page", page)):
        if target is not None:
            echo(f"{what}: {target}", err=True)
    if outcome.resumed:
        echo(f"{outcome.resumed:,} were captioned before the interruption", err=True)
    if outcome.passed_over:
        echo(f"{outcome.passed_over:,} already captioned: skipped", err=True)
    for path, reason in (outcome.failures | inputs.failures).items():
        echo_failure(decodable(path), reason)
    if outcome.failures:
        failed, total = len(outcome.failures), len(inputs.paths)
        echo(f"{failed:,} of {total:,} images could not be read or written", err=True)
    if inputs.failures:
        echo(f"folders that could not be listed: {len(inputs.failures):,}", err=True)
    if outcome.failures or inputs.failures:
        sys.exit(1)


def _load(models: Sequence[Path], device: str, weights: str | None, images: int) -> Captioner:
    from pipeline.captioner import Captioner
    from pipeline.models.openvino import WORTH_COMPILING

    engine = "auto" if images >= WORTH_COMPILING else "torch"
    return Captioner.load(models, device, weights, engine=engine)


def _fingerprint(models: Sequence[Path]) -> str:
    """Return a string that changes with the size or time of the model files."""
    parts = []
    for model in models:
        information = checkpoint_path(model).stat()
        parts.append(f"{information.st_size} {information.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
