"""What captions mention, as directions in the teacher's features; ``distil_encoder`` weights them.

The teacher distinguishes 120 breeds of dogs; captions hardly do, but they distinguish girls from
boys. A student without the time to learn all that the teacher knows should first learn what changes
captions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions, tokenized
from pipeline.datasets.image_sources import ImageFolder
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.models.ngram_predictor import ngram_targets

# In a trial with words and word pairs, this many predicted those of Flickr8k's dev as well as all
# 1,280 features did.
DIRECTIONS = 128
# Ridge of the regression, per image: in the same trial, the best of 0.05 to 7.
RIDGE = 1.7


def captioned_pictures(data: Path) -> tuple[list[Path], EncodedCaptions]:
    """Return the photographs of a folder's train split, and their captions in the same order."""
    source = ImageFolder(data)
    table, names = read_captions(source).restrict(source.names)
    captions = tokenized(table.of_split("train"))
    vocabulary = Vocabulary.build(words for group in captions.values() for words in group)
    paths = [source.image(names[name]) for name in captions]
    return paths, encode_captions(captions.values(), vocabulary)


def caption_directions(
    features: Tensor, captions: EncodedCaptions, count: int = DIRECTIONS
) -> Tensor:
    """Return the directions along which features change the captions most: float32 (F, count).

    They are the principal components of the n-grams, weighted as by CIDEr-D, that ridge regression
    predicts from the features. A component's standard deviation says how much it changes captions:
    1 for the first, less for each later one.

    Args:
        features: pooled features of the captioned photographs, float32 (N, F).
        captions: of the same photographs.
        count: maximum number of directions.
    """
    vectors = ngram_targets(captions).vectors
    deviation = features.std(0) + 1e-3 * features.std()
    given = (features - features.mean(0)) / deviation
    gram = given.T @ given
    products = (vectors @ given).T  # (F, K); the features' mean is 0, so that of n-grams drops out
    ridge = RIDGE * len(given) * torch.eye(len(gram))
    weights = torch.linalg.solve(gram + ridge, products)
    # Components of the predictions given @ weights, without these (N, K).
    values, axes = torch.linalg.eigh(gram)
    root = axes * values.clamp_min(0).sqrt()
    _, sizes, components = torch.linalg.svd(root.T @ weights, full_matrices=False)
    scale = len(given) ** 0.5 / sizes[0]
    return scale * weights @ components[:count].T / deviation[:, None]
