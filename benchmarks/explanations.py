"""Test explanations by deletion: does a word's log-probability need the cells that speak for it?

    python benchmarks/explanations.py photos/ --images 200

For each content word of an image's caption, the five cells that add most to it, and in another copy
five random cells, are painted with the image's mean colour; both copies are encoded and scored
again. Explanations are right if losing the former lowers the word's log-probability more.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import click
import numpy
import torch
from measure import echo

from pipeline import Captioner
from pipeline.datasets.find_images import find_images
from pipeline.datasets.images import IMAGE_SIZE, read_square
from pipeline.decoding.captions import token_log_probabilities
from pipeline.models.encoder import CELLS

DELETED = 5
GRAMMAR = {
    *("a an the this that some one two in on at of with by to for from into near and or".split()),
    *("while as is are be it its his her their there".split()),
}


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="pretrained", help="A run folder or a checkpoint.")
@click.option("--images", default=200, help="Number of images, evenly spaced.")
def main(folder: Path, model: str, images: int) -> None:
    """Print by how much deleting cells lowers words' log-probabilities."""
    captioner = Captioner.load(model, precision="fp32")
    names = sorted(find_images(folder))
    names = names[:: max(1, len(names) // images)][:images]
    random = numpy.random.default_rng(0)
    drops = numpy.array(
        list(
            itertools.chain.from_iterable(
                measure(captioner, read_square(folder / name), random) for name in names
            )
        )
    )
    chosen, arbitrary = drops.mean(axis=0)
    error = (drops[:, 0] - drops[:, 1]).std() / len(drops) ** 0.5
    wins = (drops[:, 0] > drops[:, 1]).mean()
    echo(f"{len(drops):,} words of {len(names):,} images; mean loss of log-probability, in nats")
    echo(f"the {DELETED} cells that add most: {chosen:.3f}; {DELETED} random ones: {arbitrary:.3f}")
    echo(
        f"difference {chosen - arbitrary:.3f} ± {error:.3f}; larger for {100 * wins:.0f} % of words"
    )


def measure(
    captioner: Captioner, square: numpy.ndarray, random: numpy.random.Generator
) -> list[tuple[float, float]]:
    """Return how much each content word loses without its best cells, and without random ones."""
    found = captioner.explain(square)
    places = [place for place, word in enumerate(found.words) if word not in GRAMMAR]
    deleted = [square]
    for place in places:
        best = numpy.argsort(found.maps[place].ravel())[-DELETED:]
        deleted.append(without(square, best))
        deleted.append(without(square, random.choice(CELLS**2, DELETED, replace=False)))
    features = torch.from_numpy(captioner.encoder.encode(deleted))
    tokens = captioner.vocabulary.encode(found.words)
    each = token_log_probabilities(captioner.decoder, features, [[tokens]] * len(deleted))
    whole, *others = [numpy.array(nats) for [nats] in each]
    return [
        (whole[place] - others[2 * n][place], whole[place] - others[2 * n + 1][place])
        for n, place in enumerate(places)
    ]


def without(square: numpy.ndarray, cells: numpy.ndarray) -> numpy.ndarray:
    """Return a copy of a square with some cells in its mean colour."""
    edges = numpy.linspace(0, IMAGE_SIZE, CELLS + 1).round().astype(int)
    changed = square.copy()
    for cell in cells:
        row, column = divmod(int(cell), CELLS)
        rows, columns = slice(*edges[row : row + 2]), slice(*edges[column : column + 2])
        changed[rows, columns] = square.mean(axis=(0, 1))
    return changed


if __name__ == "__main__":
    main()
