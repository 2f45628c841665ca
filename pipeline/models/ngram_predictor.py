"""Predict the n-grams of an image's captions from the image, for consensus reranking.

A caption that agrees with the captions of similar training images is more often right (Devlin et
al., arXiv 1505.04467), but to compare with them, a model would have to store the training captions.
A ridge regression from the decoder's image embedding to CIDEr-D's n-gram vectors of captions (arXiv
1411.5726) stores none, is smaller, and chooses better captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions
from pipeline.metrics.cider import LONGEST_NGRAM
from pipeline.models.ensemble import CaptionDecoder

# With more training images, an evenly spaced sample is used.
MOST_IMAGES = 10_000
# Only n-grams found in at least this many images are predicted (fewer if there are few images):
# rarer ones cannot be learned, and would reveal single captions.
FEWEST_IMAGES, MOST_NGRAMS = 10, 5_000
# The ridge penalty. On Flickr8k's val split, 0.03 to 1 score alike.
RIDGE = 0.3
# For hashing n-grams into 64 bits: odd, with well-mixed bits.
MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)


@dataclass
class NgramPredictor:
    """A linear map from the image embeddings of M decoders (1 or an ensemble) to n-grams.

    Attributes:
        keys: int64 (K,): the n-grams, hashed by ``count_ngrams``; ascending as unsigned numbers.
        idf: float32 (K + 1,): inverse document frequency of each; the last is for all others.
        mean: float32 (M, E): the mean image embeddings of the training images.
        weights: float32 (M * E, K), for the embeddings' directions from the mean.
        intercept: float32 (K,).
    """

    keys: Tensor
    idf: Tensor
    mean: Tensor
    weights: Tensor
    intercept: Tensor

    def predict(self, images: Tensor) -> Tensor:
        """Predict the n-grams of images with embeddings (B, M * E): float32 (B, K), at least 0."""
        return (_directions(images, self.mean) @ self.weights + self.intercept).clamp(min=0)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all fields as tensors for ``from_tensors``; the weights as float16."""
        return vars(self) | {"weights": self.weights.half()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> NgramPredictor:
        """Rebuild a predictor; raise KeyError or ValueError if the tensors do not form one."""
        keys, rest = tensors["keys"], [tensors[n].float() for n in ("idf", "mean", "weights")]
        idf, mean, weights = rest
        unsigned = keys.numpy().view(numpy.uint64)
        whole = (
            keys.dtype == torch.int64
            and keys.dim() == 1
            and mean.dim() == 2
            and idf.shape == (len(keys) + 1,)
            and weights.shape == (mean.numel(), len(keys))
            and tensors["intercept"].shape == (len(keys),)
            and len(keys) > 0
            and bool((unsigned[1:] > unsigned[:-1]).all())
        )
        if not whole:
            raise ValueError("the n-gram predictor does not fit together")
        return cls(keys, idf, mean, weights, tensors["intercept"].float())


@dataclass
class NgramTargets:
    """What a predictor learns; see ``ngram_targets``.

    Attributes:
        keys, idf: as in ``NgramPredictor``.
        vectors: sparse float32 (K, N): for each n-gram and image the mean, over the image's
            captions, of the n-gram's value in the caption's vector of unit norm.
    """

    keys: Tensor
    idf: Tensor
    vectors: Tensor


def ngram_targets(captions: EncodedCaptions) -> NgramTargets:
    """Count the n-grams that captions share, and weight them as CIDEr-D does."""
    of_caption = captions.images.numpy()
    images = int(of_caption[-1]) + 1
    lengths = (captions.lengths - 1).numpy()  # with <end>, without <start>
    offsets = captions.offsets.numpy()
    inside = numpy.ones(len(captions.tokens), dtype=bool)
    inside[offsets[:-1]] = False
    found, owners, counts = count_ngrams(captions.tokens.numpy()[inside], lengths)
    keys, numbers = numpy.unique(found, return_inverse=True)
    # Document frequency counts an image once, however many of its captions have the n-gram.
    pairs = numpy.sort(numbers * images + of_caption[owners])
    once = pairs[numpy.append(True, pairs[1:] != pairs[:-1])]
    frequencies = numpy.bincount(once // images, minlength=len(keys))
    idf = numpy.log(images) - numpy.log(frequencies)
    orders = orders_of(found)
    norms = vector_norms(counts * idf[numbers], orders, owners, len(lengths))
    shares = 1 / numpy.bincount(of_caption, minlength=images)
    values = counts * idf[numbers] / norms[owners, orders] * shares[of_caption[owners]]

    frequent = numpy.flatnonzero(frequencies >= min(FEWEST_IMAGES, 2 + images // 100))
    most = frequent[numpy.argsort(-frequencies[frequent], kind="stable")[:MOST_NGRAMS]]
    kept = numpy.sort(most)
    column = numpy.full(len(keys), -1)
    column[kept] = numpy.arange(len(kept))
    known = column[numbers] >= 0
    places = numpy.stack([column[numbers[known]], of_caption[owners[known]]])
    vectors = torch.sparse_coo_tensor(
        torch.from_numpy(places),
        torch.from_numpy(values[known].astype(numpy.float32)),
        (len(kept), images),
        check_invariants=False,
    )
    return NgramTargets(
        torch.from_numpy(keys[kept].view(numpy.int64)),
        torch.from_numpy(numpy.append(idf[kept], numpy.log(images)).astype(numpy.float32)),
        vectors.coalesce(),
    )


def sampled_images(count: int) -> Tensor:
    """Return which of ``count`` training images are used: int64 (up to MOST_IMAGES,)."""
    return torch.arange(0, count, max(1, -(-count // MOST_IMAGES)))


@torch.inference_mode()
def fit_predictor(
    decoder: CaptionDecoder, features: Iterable[Tensor], targets: NgramTargets
) -> NgramPredictor | None:
    """Fit a predictor of images' n-grams from their embeddings in ``decoder``, in eval mode.

    ``features`` are those of the targets' images, in batches (B, 2048).

    Returns:
        None if the images share no n-grams.
    """
    if not len(targets.keys):
        return None
    device, members = decoder.feature_mean.device, decoder.config.members
    images = torch.cat(
        [decoder.embed_image(batch.to(device))[0][:, 0].float().cpu() for batch in features]
    )
    mean = images.mean(0).view(members, -1)
    directions = _directions(images, mean)
    intercept = torch.sparse.sum(targets.vectors, 1).to_dense() / len(images)
    products = targets.vectors @ directions - torch.outer(intercept, directions.sum(0))
    gram = directions.T @ directions + RIDGE * torch.eye(directions.shape[1])
    weights = torch.linalg.solve(gram, products.T).contiguous()
    return NgramPredictor(targets.keys, targets.idf, mean.clone(), weights, intercept)


def merge_predictors(members: Sequence[NgramPredictor | None]) -> NgramPredictor | None:
    """Return the mean of the predictors of an ensemble's members.

    Returns:
        None if a member has none, or if they were fitted to different captions.
    """
    predictors = [member for member in members if member is not None]
    alike = len(predictors) == len(members) and all(
        torch.equal(other.keys, predictors[0].keys) for other in predictors
    )
    if not alike:
        return None
    return NgramPredictor(
        predictors[0].keys,
        predictors[0].idf,
        torch.cat([member.mean for member in predictors]),
        torch.cat([member.weights for member in predictors]) / len(predictors),
        torch.stack([member.intercept for member in predictors]).mean(0),
    )


def count_ngrams(
    tokens: numpy.ndarray, lengths: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Count the n-grams, n = 1 to 4, of concatenated captions: tokens (T,), their lengths (C,).

    Returns:
        For every distinct n-gram of every caption: its key, uint64, whose lowest two bits are
        n - 1; its caption, ascending; and its count.
    """
    owner = numpy.repeat(numpy.arange(len(lengths)), lengths)
    keys, owners = [], []
    mixed = numpy.zeros(len(tokens), dtype=numpy.uint64)
    values = tokens.astype(numpy.uint64) + numpy.uint64(1)
    for n in range(1, LONGEST_NGRAM + 1):
        inside = max(0, len(tokens) - n + 1)
        mixed = _mix(mixed[:inside] ^ values[n - 1 :])
        whole = owner[:inside] == owner[n - 1 :]
        keys.append((mixed[whole] << numpy.uint64(2)) | numpy.uint64(n - 1))
        owners.append(owner[:inside][whole])
    key, caption = numpy.concatenate(keys), numpy.concatenate(owners)
    order = numpy.lexsort((key, caption))
    key, caption = key[order], caption[order]
    new = numpy.append(True, (key[1:] != key[:-1]) | (caption[1:] != caption[:-1]))
    first = numpy.flatnonzero(new)
    return key[first], caption[first], numpy.diff(numpy.append(first, len(key)))


def orders_of(keys: numpy.ndarray) -> numpy.ndarray:
    """Return n - 1 of each n-gram."""
    return (keys & numpy.uint64(3)).astype(numpy.int64)


def vector_norms(
    weights: numpy.ndarray, orders: numpy.ndarray, owners: numpy.ndarray, captions: int
) -> numpy.ndarray:
    """Return the norms of captions' vectors, for n = 1 to 4: (captions, 4), 1 where they are 0."""
    cells = numpy.bincount(
        owners * LONGEST_NGRAM + orders, weights**2, minlength=captions * LONGEST_NGRAM
    )
    norms = numpy.sqrt(cells).reshape(captions, LONGEST_NGRAM)
    return numpy.where(norms > 0, norms, 1.0)


def _mix(values: numpy.ndarray) -> numpy.ndarray:
    """Hash 64-bit numbers, one to one."""
    values = values * MULTIPLIER  # wraps around
    return values ^ (values >> numpy.uint64(29))


def _directions(images: Tensor, mean: Tensor) -> Tensor:
    """Return embeddings (B, M * E) minus their mean (M, E), of unit norm for each member."""
    centred = images.float().cpu().unflatten(1, mean.shape) - mean
    return F.normalize(centred, dim=2).flatten(1)
