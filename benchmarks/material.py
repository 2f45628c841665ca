"""What the benchmark works on: images, captions, weights and features.

Photographs and captions are Flickr8k's if ``../shared`` has them, else drawn scenes: speed hardly
depends on what an image shows. Features to train on are synthetic: the sum of a random vector
for every word of an image's captions, and noise, so that there is something to learn.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from measure import ROOT
from PIL import Image

from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.encoded_captions import tokenized
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.cache import CHUNK, FeatureCache
from pipeline.features.cache_writer import open_writer
from pipeline.models.encoder import load_encoder
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity

SHARED = ROOT.parent / "shared"
PHOTOGRAPHS = SHARED / "flickr8k_fullres"
STANDIN = SHARED / "weights" / "inception_v3_standin.pth"
FLICKR8K = SHARED / "flickr8k"
TRAIN_PICTURES, VAL_PICTURES = 6_000, 1_000


@dataclass
class Material:
    """Everything that the comparisons share.

    Attributes:
        images: a folder of images of about 500 x 375.
        weights: what ``--weights`` of extract_features.py takes.
        train, val: tokenised captions by image.
        vocabulary: the words seen five times in ``train``.
        train_cache, val_cache: synthetic features, one row per image in that order.
        description: one line on the above.
    """

    images: Path
    weights: str
    train: list[list[list[str]]]
    val: list[list[list[str]]]
    vocabulary: Vocabulary
    train_cache: FeatureCache
    val_cache: FeatureCache
    description: str


def prepare(folder: Path, count: int) -> Material:
    """Collect or make everything; ``count`` images, repeated if there are fewer."""
    images = folder / "images"
    originals = sorted(PHOTOGRAPHS.glob("*.jpg")) or draw_images(folder / "drawn")
    images.mkdir()
    for number in range(count):
        original = originals[number % len(originals)]
        (images / f"{number:05d}.jpg").write_bytes(original.read_bytes())
    train, val, captions_from = collect_captions()
    vocabulary = Vocabulary.build((words for group in train for words in group), 5)
    train_cache, val_cache = (
        write_cache(folder / f"{split}.h5", made_up_features(groups))
        for split, groups in (("train", train), ("val", val))
    )
    return Material(
        images,
        str(STANDIN) if STANDIN.is_file() else "random",
        train,
        val,
        vocabulary,
        train_cache,
        val_cache,
        f"{len(originals)} {'photographs' if PHOTOGRAPHS.is_dir() else 'drawn images'} of about "
        f"500 x 375, {captions_from}, vocabulary {len(vocabulary):,}",
    )


def draw_images(folder: Path) -> list[Path]:
    """Draw scenes of the size of Flickr8k's photographs."""
    sys.path.insert(0, str(ROOT / "data"))
    from draw_scenes import draw_scenes

    draw_scenes(folder, 40, 0)
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")]
    for path in paths:
        with Image.open(path) as image:
            larger = image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        path.unlink()
        larger.save(path.with_suffix(".jpg"), quality=90)
    return [path.with_suffix(".jpg") for path in paths]


def collect_captions() -> tuple[list[list[list[str]]], list[list[list[str]]], str]:
    """Return tokenised captions of train and val images, and where they are from."""
    if FLICKR8K.is_dir():
        table = read_captions(FLICKR8K, None)
        splits = [list(tokenized(table.of_split(split)).values()) for split in ("train", "val")]
        return splits[0], splits[1], "captions of Flickr8k"
    sys.path.insert(0, str(ROOT / "data"))
    from draw_scenes import compose, write_captions

    rng = random.Random(0)
    groups = [
        [caption.lower().split() for caption in write_captions(compose(rng), rng)]
        for _ in range(TRAIN_PICTURES + VAL_PICTURES)
    ]
    return groups[:TRAIN_PICTURES], groups[TRAIN_PICTURES:], "captions of drawn scenes"


def made_up_features(groups: list[list[list[str]]]) -> numpy.ndarray:
    """Return float32 (len(groups), 2048): the sum of a direction for every word, and noise."""
    rng = numpy.random.default_rng(0)
    directions: dict[str, numpy.ndarray] = {}
    rows = rng.standard_normal((len(groups), FEATURE_SIZE), dtype=numpy.float32)
    for row, group in zip(rows, groups, strict=True):
        for word in sorted({word for words in group for word in words}):
            if word not in directions:
                own = numpy.random.default_rng(list(word.encode()))
                directions[word] = own.standard_normal(FEATURE_SIZE, dtype=numpy.float32)
            row += 0.5 * directions[word]
    return rows


def write_cache(path: Path, features: numpy.ndarray, rows: int | None = None) -> FeatureCache:
    """Write a cache of ``rows`` images, repeating the features."""
    identity = EncoderIdentity("inception_v3", "0" * 64, "made up", "fp32", "random", "0")
    count = rows or len(features)
    names = [f"{number:07d}.jpg" for number in range(count)]
    writer = open_writer(path, names, identity)
    step = min(len(features), CHUNK)
    for start in range(0, count, step):
        chunk = range(start, min(start + step, count))
        writer.write(chunk, features[: len(chunk)], {})
        writer.commit()  # what is pending until then counts as the process's memory
    return writer.finish()


def inception_weights(weights: str) -> dict[str, torch.Tensor]:
    """Return the trunk as a torchvision state dict in fp32."""
    return load_encoder(weights).trunk.state_dict()


def hard_links(original: Path, folder: Path, count: int) -> None:
    """Fill a folder with ``count`` names for the images of another."""
    originals = sorted(original.iterdir())
    folder.mkdir()
    for number in range(count):
        os.link(originals[number % len(originals)], folder / f"{number:06d}.jpg")
