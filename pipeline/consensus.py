"""Choosing among the captions that a search found: the one that pictures like this one have.

Devlin et al. (arXiv 1505.04467) caption a picture by its nearest training pictures: the
caption that agrees best with all of theirs. Here the candidates are the decoder's own, which
fit the picture, and the neighbours only choose: a candidate's score is its log-probability,
length-normalised, plus a weight times its agreement, the CIDEr-D with the neighbours' captions.
Near is what the decoder's image embedding holds to be near.

``cider`` computes the same, caption by caption; here all candidates meet the captions of all
neighbours at once, in arrays: about two milliseconds a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.cider import LONGEST_NGRAM, SIGMA
from pipeline.dataset import EncodedCaptions
from pipeline.ensemble import CaptionDecoder
from pipeline.search import Hypothesis
from pipeline.vocabulary import END_ID

# Of more training pictures an evenly spaced sample is kept: with Flickr8k's 6,000 a checkpoint
# grows by 4 MB.
MOST_PICTURES = 10_000
NEIGHBOURS = 60
# A neighbour counts exp(cosine / TEMPERATURE). On val all from 0.05 to 0.1 did alike.
TEMPERATURE = 0.05
# For hashing n-grams into 64 bits: an odd number whose bits are well mixed.
MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)


@dataclass
class Neighbours:
    """Training pictures to compare with, as they are kept in a checkpoint.

    Attributes:
        mean: float32 (E,): the mean image embedding.
        directions: float16 (N, E): the others' difference from it, of length 1.
        captions: of these pictures, by their number.
    """

    mean: Tensor
    directions: Tensor
    captions: EncodedCaptions

    def to_tensors(self) -> dict[str, Tensor]:
        """Give all as tensors, by name."""
        return {
            "mean": self.mean,
            "directions": self.directions,
            "pictures": self.captions.pictures.int(),
            "tokens": self.captions.tokens,
            "offsets": self.captions.offsets.int(),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Neighbours:
        """Make it again of ``to_tensors``.

        Raises:
            KeyError, ValueError: the tensors are not of one such object.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        pictures, offsets = tensors["pictures"], tensors["offsets"]
        count, width = shapes["directions"]
        whole = (
            shapes["mean"] == (width,)
            and shapes["offsets"] == (len(pictures) + 1,)
            and pictures.dim() == 1
            and len(pictures) >= count > 0
            and bool((pictures.diff() >= 0).all())
            and pictures.unique().tolist() == list(range(count))
            and bool((offsets.diff() >= 2).all())
            and (int(offsets[0]), int(offsets[-1])) == (0, len(tensors["tokens"]))
        )
        if not whole:
            raise ValueError("neighbours of other shapes")
        captions = EncodedCaptions(
            tensors["pictures"].long(), tensors["tokens"].int(), tensors["offsets"].long()
        )
        return cls(tensors["mean"].float(), tensors["directions"].half(), captions)


def sampled_pictures(count: int) -> Tensor:
    """Choose the training pictures to keep, of so many: int64 (up to MOST_PICTURES,)."""
    return torch.arange(0, count, max(1, -(-count // MOST_PICTURES)))


@torch.inference_mode()
def choose_neighbours(
    decoder: CaptionDecoder, pictures: Tensor, features: Iterable[Tensor], captions: EncodedCaptions
) -> Neighbours:
    """Keep training pictures to compare with.

    Args:
        decoder: in eval mode.
        pictures: int64 (P,): their numbers, rising.
        features: theirs, in batches (B, 2048).
        captions: of all training pictures.
    """
    device = decoder.feature_mean.device
    embeddings = torch.cat(
        [decoder.embed_image(batch.to(device))[0][:, 0].float().cpu() for batch in features]
    )
    mean = embeddings.mean(0)
    everyone = len(pictures) == int(captions.pictures[-1]) + 1
    return Neighbours(
        mean.clone(),
        F.normalize(embeddings - mean, dim=1).half().clone(),
        captions if everyone else captions.of_pictures(pictures),
    )


def merge_neighbours(neighbours: Sequence[Neighbours]) -> Neighbours | None:
    """Make those of an ensemble of its members': near is what is near to all of them.

    Returns:
        None where the members keep other training pictures, or captions, than each other.
    """
    first, *others = neighbours
    for other in others:
        mine, theirs = first.captions, other.captions
        if not (
            torch.equal(mine.pictures, theirs.pictures) and torch.equal(mine.tokens, theirs.tokens)
        ):
            return None
    return Neighbours(
        torch.cat([member.mean for member in neighbours]),
        F.normalize(torch.cat([m.directions.float() for m in neighbours], dim=1), dim=1).half(),
        first.captions,
    )


class Consensus:
    """Ranks captions by what similar training pictures have."""

    def __init__(self, neighbours: Neighbours) -> None:
        self._mean = neighbours.mean
        self._directions = neighbours.directions.float()
        captions = neighbours.captions
        pictures = len(self._directions)
        self._first_caption = captions.first_of_picture.numpy()
        lengths = (captions.lengths - 1).numpy()  # with <end>, without <start>
        self._bigrams = (lengths - 1).astype(numpy.float32)
        offsets = captions.offsets.numpy()
        words = captions.tokens.numpy()[_ranges(offsets[:-1] + 1, offsets[1:])]
        keys, owners, counts = _counted_ngrams(words, lengths)
        # As an n-gram's number its place among all, in order.
        self._keys, numbers = numpy.unique(keys, return_inverse=True)
        # A picture has an n-gram once, in however many of its captions.
        # (Sorted by hand: numpy's unique hashes such numbers, which took 0.7 s for Flickr8k's.)
        pairs = numpy.sort(numbers * pictures + captions.pictures.numpy()[owners])
        once = pairs[numpy.append(True, pairs[1:] != pairs[:-1])]
        frequencies = numpy.bincount(once // pictures, minlength=len(self._keys))
        self._rarest = float(numpy.log(pictures))
        self._rarity = self._rarest - numpy.log(frequencies)
        rarity, orders = self._rarity[numbers], _orders(keys)
        norms = _norms(counts * rarity, orders, owners, len(lengths))
        # The n-grams of all captions behind each other: what one of them adds to the cosine is
        # its value times the lesser of the two captions' counts of it, over the other's norm.
        self._numbers = numbers.astype(numpy.int32)
        self._counts = counts.astype(numpy.float32)
        self._values = (counts * rarity**2 / norms[owners, orders]).astype(numpy.float32)
        self._first_ngram = numpy.searchsorted(owners, numpy.arange(len(lengths) + 1))
        # For one picture: which of the candidates' n-grams a number is, -1 for none.
        self._slots = numpy.full(len(self._keys), -1, dtype=numpy.int32)

    def rank(
        self, images: Tensor, found: Sequence[Sequence[Hypothesis]], weight: float
    ) -> list[list[Hypothesis]]:
        """Order the hypotheses of pictures with embeddings (B, E) by log-probability and agreement.

        Returns:
            The hypotheses with their new scores, best first.
        """
        directions = F.normalize(images.float().cpu() - self._mean, dim=1)
        cosines = directions @ self._directions.t()
        near, pictures = cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1)
        shares = (near / TEMPERATURE).softmax(dim=1)
        ranked = []
        for hypotheses, who, share in zip(found, pictures.numpy(), shares.numpy(), strict=True):
            agreement = self._agreement([h.tokens for h in hypotheses], who, share)
            scored = [
                replace(hypothesis, score=hypothesis.score + weight * value)
                for hypothesis, value in zip(hypotheses, agreement.tolist(), strict=True)
            ]
            ranked.append(sorted(scored, key=lambda h: h.score, reverse=True))
        return ranked

    def _agreement(
        self, candidates: list[list[int]], pictures: numpy.ndarray, shares: numpy.ndarray
    ) -> numpy.ndarray:
        """Give the CIDEr-D, from 0 to 10, of captions with those of pictures, by their shares."""
        lengths = numpy.array([len(tokens) + 1 for tokens in candidates])
        flat = numpy.array([t for tokens in candidates for t in (*tokens, END_ID)], numpy.int32)
        keys, owners, counts = _counted_ngrams(flat, lengths)
        places = numpy.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        known = self._keys[places] == keys
        rarity = numpy.where(known, self._rarity[places], self._rarest)
        norms = _norms(counts * rarity, _orders(keys), owners, len(candidates))
        # A column for every different n-gram of the candidates that training pictures have.
        ngrams, columns = numpy.unique(places[known], return_inverse=True)
        table = numpy.zeros((len(candidates), len(ngrams)), dtype=numpy.float32)
        table[owners[known], columns] = counts[known]
        scale = (1 / norms[:, _orders(self._keys[ngrams])]).astype(numpy.float32)

        captions = _ranges(self._first_caption[pictures], self._first_caption[pictures + 1])
        rows = _ranges(self._first_ngram[captions], self._first_ngram[captions + 1])
        self._slots[ngrams] = numpy.arange(len(ngrams))
        columns = self._slots[self._numbers[rows]]
        self._slots[ngrams] = -1
        shared = columns >= 0
        rows, columns = rows[shared], columns[shared]
        lesser = numpy.minimum(table[:, columns], self._counts[rows]) * scale[:, columns]
        whose = numpy.repeat(
            numpy.arange(len(captions)),
            self._first_ngram[captions + 1] - self._first_ngram[captions],
        )[shared]
        cosines = numpy.stack(
            [
                numpy.bincount(whose, row, minlength=len(captions))
                for row in lesser * self._values[rows]
            ]
        )  # (candidates, captions)
        difference = (lengths - 1)[:, None] - self._bigrams[captions]
        cosines *= numpy.exp(-(difference**2) / (2 * SIGMA**2))
        number = self._first_caption[pictures + 1] - self._first_caption[pictures]
        return 10 / LONGEST_NGRAM * cosines @ numpy.repeat(shares / number, number)


def _ranges(first: numpy.ndarray, last: numpy.ndarray) -> numpy.ndarray:
    """Put the numbers of several ranges, the last of each not included, behind each other."""
    lengths = last - first
    numbers = numpy.repeat(first - (numpy.cumsum(lengths) - lengths), lengths)
    return numbers + numpy.arange(len(numbers))


def _counted_ngrams(
    tokens: numpy.ndarray, lengths: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Count the n-grams of captions that lie behind each other.

    Args:
        tokens: (T,), of all captions.
        lengths: (C,), tokens of each.

    Returns:
        For every different n-gram of every caption its number, uint64, whose lowest two bits are
        n - 1; its caption, in their order; and how often it is there.
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
    _, first, counts = numpy.unique(
        key ^ _mix(caption.astype(numpy.uint64) + numpy.uint64(1)),
        return_index=True,
        return_counts=True,
    )
    first, counts = first[order := numpy.argsort(caption[first], kind="stable")], counts[order]
    return key[first], caption[first], counts


def _mix(values: numpy.ndarray) -> numpy.ndarray:
    """Spread numbers over 64 bits: different ones stay different."""
    values = values * MULTIPLIER  # wraps around
    return values ^ (values >> numpy.uint64(29))


def _orders(keys: numpy.ndarray) -> numpy.ndarray:
    """Tell n - 1 of each n-gram."""
    return (keys & numpy.uint64(3)).astype(numpy.int64)


def _norms(
    weights: numpy.ndarray, orders: numpy.ndarray, owners: numpy.ndarray, captions: int
) -> numpy.ndarray:
    """Give the norms of captions' vectors, for n = 1 to 4: (captions, 4), 1 where they are 0."""
    cells = numpy.bincount(
        owners * LONGEST_NGRAM + orders, weights**2, minlength=captions * LONGEST_NGRAM
    )
    norms = numpy.sqrt(cells).reshape(captions, LONGEST_NGRAM)
    return numpy.where(norms > 0, norms, 1.0)
