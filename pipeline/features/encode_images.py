"""Encode many images: threads decode and encode, and processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from pipeline.datasets.image_sources import stop_if_unreachable
from pipeline.datasets.images import ImageError, ImageLike, ImageRef, read_square
from pipeline.models.encoder import CELLS, Encoder
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.utils.devices import inference_batch_size, threads_per_worker
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.threads import prefetch

# The largest float16, the type that caches store. Damaged weights can give infinity or NaN.
LARGEST_FEATURE = 65504.0


@dataclass
class EncodedBatch:
    """One batch of images after the encoder."""

    keys: list[int]  # which images were read, in order
    features: numpy.ndarray  # float32 (len(keys), 2048)
    failures: dict[int, str]  # key of each image that could not be read, and why
    cells: numpy.ndarray  # float32 (len(keys), 64, 2048), before pooling; or (0,), not requested


def encode_batches(
    encoder: Encoder,
    batches: Iterable[Sequence[tuple[int, ImageLike]]],
    workers: int,
    with_cells: bool = False,
) -> Iterator[EncodedBatch]:
    """Decode and encode files, given in batches of (key, path); yield the batches in order.

    Each of ``workers`` threads processes whole batches: on a CPU with its own share of the cores,
    so that none waits for another in the middle of the network; on a GPU one encodes while the
    others decode. Memory holds a few batches per worker.

    Raises:
        UserError: the encoder's output is not finite.
    """

    def encode(batch: Sequence[tuple[int, ImageLike]]) -> EncodedBatch:
        squares: dict[int, numpy.ndarray] = {}
        failures: dict[int, str] = {}
        for key, path in batch:
            try:
                squares[key] = read_square(path)
            except ImageError as error:
                failures[key] = str(error)
        features = numpy.empty((0, FEATURE_SIZE), numpy.float32)
        cells = numpy.empty((0, CELLS**2, FEATURE_SIZE) if with_cells else 0, numpy.float32)
        if squares and with_cells:
            cells = encoder.encode_cells(list(squares.values()))
            features = cells.mean(axis=1)
        elif squares:
            features = encoder.encode(list(squares.values()))
        if not (numpy.abs(features) <= LARGEST_FEATURE).all():
            raise UserError(
                f"the encoder ({encoder.identity.weights_source}) gives numbers that are no "
                "features; its weights are damaged"
            )
        return EncodedBatch(list(squares), features, failures, cells)

    with threads_per_worker(workers) as share:
        yield from prefetch(
            encode, batches, workers, ahead=workers, start=lambda: torch.set_num_threads(share)
        )


def encode_images(
    encoder: Encoder, images: Sequence[ImageRef], workers: int, world: World = SINGLE_PROCESS
) -> Iterator[EncodedBatch]:
    """Encode this process's share of the files, in batches that suit the device; keys: indices."""
    size = inference_batch_size(next(encoder.parameters()).device)
    files = list(enumerate(images))
    starts = world.share(range(0, len(files), size))
    yield from encode_batches(encoder, (files[start : start + size] for start in starts), workers)


def encode_distributed(
    encoder: Encoder,
    images: Sequence[ImageRef],
    workers: int,
    world: World = SINGLE_PROCESS,
    dtype: torch.dtype = torch.float32,
    watch: Callable[[int], object] = lambda done: None,
) -> tuple[Tensor, dict[int, str]]:
    """Encode files, split among the processes of ``world``; every process gets all features.

    ``watch`` is called with the number of files that this process has done since the last call.

    Returns:
        Features (N, 2048) in the order of the files, 0 for those that cannot be read; and
        index -> reason for those.
    """
    features = torch.zeros(len(images), FEATURE_SIZE, dtype=dtype)
    encoded: list[int] = []
    failures: dict[int, str] = {}
    for batch in encode_images(encoder, images, workers, world):
        features[batch.keys] = torch.from_numpy(batch.features).to(dtype)
        encoded += batch.keys
        for key in batch.failures:
            stop_if_unreachable(images[key])
        failures |= batch.failures
        watch(len(batch.keys) + len(batch.failures))
    for keys, rows, reasons in world.all_gather((encoded, features[encoded], failures)):
        features[keys] = rows
        failures |= reasons
    return features, dict(sorted(failures.items()))
