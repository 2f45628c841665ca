"""A captioned data set of numbers: captions.csv and a feature cache, made in a moment.

Each "image" has a colour and a thing; its features are random, but alike for like
images, so that a decoder learns to caption it in a few epochs.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy

from pipeline.features.cache_writer import open_writer
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity

COLOURS = ("red", "blue", "green", "white")
THINGS = ("dog", "car", "house")
IDENTITY = EncoderIdentity("inception_v3", "0" * 64, "squeeze-299-bilinear", "fp32", "random", "0")


def make_small_data(folder: Path, images: int = 60) -> tuple[Path, Path]:
    """Write a data folder and its feature cache; returns the paths of both."""
    data, cache = folder / "small", folder / "small.h5"
    data.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(0)
    directions = {word: random.normal(size=FEATURE_SIZE) for word in COLOURS + THINGS}
    names, rows, features = [], [], []
    for number in range(images):
        colour = COLOURS[number % len(COLOURS)]
        thing = THINGS[number // len(COLOURS) % len(THINGS)]
        name = f"{number:04d}.jpg"
        names.append(name)
        features.append(
            directions[colour] + directions[thing] + 0.3 * random.normal(size=FEATURE_SIZE)
        )
        split = "val" if number % 5 == 4 else "test" if number % 5 == 3 else "train"
        rows.append((name, f"A {colour} {thing}.", split))
        rows.append((name, f"there is a {thing} , it is {colour}", split))
    with (data / "captions.csv").open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("image", "caption", "split"), *rows])
    writer = open_writer(cache, names, IDENTITY)
    writer.write(range(images), numpy.stack(features), {})
    writer.finish()
    return data, cache
