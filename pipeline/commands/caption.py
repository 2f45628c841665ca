"""Caption pictures: files, folders with their sub-folders, and patterns.

The manual is in caption.py, the advice in its --help.
"""

from __future__ import annotations

import glob
import sys
from pathlib import Path

import click

from pipeline import options
from pipeline.errors import UserError
from pipeline.files import check_writable
from pipeline.pretrained import PRETRAINED

# The run folders of stages 3 and 2, the better one first.
DEFAULT_MODELS = ("runs/joint/best.pt", "runs/decoder/best.pt")


@options.command()
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A run folder or its best.pt. Given several times, for runs that differ in their seed, "
    "the decoders caption together.  [default: runs/joint, else runs/decoder, else 'pretrained', "
    "the model that comes with the program]",
    show_default=False,
)
@click.option(
    "--weights",
    default=None,
    help="The encoder's weights, where they moved since training; checked to be the same. A "
    "model of finetune_joint.py has them inside.",
)
@options.beam_size
@options.consensus
@options.matching
@click.option(
    "--num-captions",
    type=click.IntRange(min=1),
    default=1,
    help="Captions a picture, best first; at most --beam-size.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["text", "json", "jsonl", "csv", "coco"]),
    default="text",
    help="text: path, tab, caption; coco: the COCO results format.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="File to write instead of standard output.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=None,
    help="Pictures at a time.  [default: 4 on a CPU, 64 on a GPU]",
    show_default=False,
)
def main(
    images: tuple[str, ...],
    model: tuple[Path, ...],
    weights: str | None,
    beam_size: int | None,
    consensus: float | None,
    matching: float | None,
    num_captions: int,
    layout: str,
    output: Path | None,
    device: str,
    batch_size: int | None,
) -> None:
    """Caption IMAGES: files, folders (with sub-folders) and patterns such as '*.jpg'.

    \b
    Examples:
      python caption.py photos/
      python caption.py photos/ --format csv --output captions.csv
      python caption.py a.jpg --beam-size 5 --num-captions 3
    """
    if beam_size is not None and num_captions > beam_size:
        raise UserError(
            f"--num-captions {num_captions} needs a --beam-size of at least {num_captions}"
        )
    if output is not None:
        check_writable(output)
    paths = collect(images)
    models = model or (default_model(),)

    from pipeline.captioner import Captioner
    from pipeline.openvino_engine import WORTH_COMPILING
    from pipeline.output import printable, write_predictions

    engine = "auto" if len(paths) >= WORTH_COMPILING else "torch"
    captioner = Captioner.load(models, device, weights, engine=engine)
    search = captioner.search_config(beam_size, consensus, matching, least=num_captions)
    predictions = captioner.stream(paths, search, num_captions, batch_size)
    failures = write_predictions(predictions, len(paths), layout, output)
    for path, reason in failures.items():
        click.echo(f"failed: {printable(path)}: {reason}", err=True)
    if failures:
        click.echo(f"{len(failures)} of {len(paths)} pictures could not be read", err=True)
        sys.exit(1)


def collect(arguments: tuple[str, ...]) -> list[str]:
    """Turn files, folders and patterns into a list of paths, each once, in their order.

    Raises:
        UserError: an argument names nothing, or no picture.
    """
    from pipeline.images import IMAGE_EXTENSIONS, find_images

    paths: dict[str, None] = {}
    for argument in arguments:
        if Path(argument).is_file():
            found = [argument]  # whatever its name says
        else:
            # The shell expands patterns, but not on Windows and not in quotes.
            matches = [argument] if Path(argument).is_dir() else sorted(_matches(argument))
            found = []
            for path in map(Path, matches):
                if path.is_dir():
                    found += [str(path / name) for name in find_images(path)]
                elif path.suffix.lower() in IMAGE_EXTENSIONS:
                    found.append(str(path))
            if not matches:
                raise UserError(f"{argument}: no such file, folder or pattern")
            if not found:
                raise UserError(f"{argument}: no pictures there")
        paths.update(dict.fromkeys(found))
    return list(paths)


def _matches(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 - also for absolute patterns


def default_model() -> Path:
    """Find the model to use when none is named: the user's own, or else the one in the box."""
    for candidate in DEFAULT_MODELS:
        if Path(candidate).is_file():
            click.echo(f"model: {candidate}", err=True)
            return Path(candidate)
    click.echo(
        "model: the one that comes with the program (--model pretrained), trained on Flickr8k for "
        "research and education; see data/pretrained/MODEL_CARD.md",
        err=True,
    )
    return Path(PRETRAINED)
