"""The features of a split, whatever the size of the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from pipeline.features.cache import FeatureCache
from pipeline.models.encoder_identity import FEATURE_SIZE


def rows_of(cache: FeatureCache, names: Sequence[str]) -> Tensor:
    """Return the rows of images: int64 (len(names),).

    Raises:
        KeyError: a name is not in the cache.
        UserError: one of these rows is damaged.
    """
    rows = cache.rows(names)
    if (rows < 0).any():
        raise KeyError(names[int((rows < 0).argmax())])
    cache.refuse_damage(cache.damaged_rows(rows))
    return torch.from_numpy(rows)


class FeatureSet:
    """The features of some images: in memory, or read from the cache batch by batch.

    They are held as float16 if that takes no more than ``memory`` bytes.
    """

    def __init__(self, cache: FeatureCache, rows: Tensor, memory: float) -> None:
        self._cache = cache
        self._rows = rows
        self._held: Tensor | None = None
        if len(rows) * FEATURE_SIZE * 2 <= memory:
            self._held = torch.empty(len(rows), FEATURE_SIZE, dtype=torch.float16)
            for images in torch.arange(len(rows)).split(4096):
                self._held[images] = self._read(images)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size(self) -> int:
        """Bytes held in memory."""
        return 0 if self._held is None else self._held.nbytes

    def _read(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._cache.read(self._rows[images].numpy(), numpy.float16))

    def __getitem__(self, images: Tensor) -> Tensor:
        """Return the features of images, int64 (B,), as float32 (B, 2048)."""
        if self._held is None:
            return self._read(images).float()
        return self._held.index_select(0, images).float()


def feature_statistics(features: FeatureSet, sample: int = 20_000) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of features, float32 (2048,) each.

    With more than ``sample`` images, an evenly spaced sample is used.
    """
    chosen = torch.arange(0, len(features), max(1, len(features) // sample))
    total = torch.zeros(FEATURE_SIZE, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for images in chosen.split(4096):
        values = features[images].double()
        total += values.sum(0)
        squares += (values**2).sum(0)
    mean = total / len(chosen)
    deviation = (squares / len(chosen) - mean**2).clamp_min(0.0).sqrt()
    return mean.float(), deviation.float()
