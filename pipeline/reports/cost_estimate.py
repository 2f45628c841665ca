"""What extraction and training will take on this machine: a few real steps are timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.datasets.encoded_captions import EncodedCaptions, bucketed_batches, count_batches
from pipeline.datasets.images import ImageRef
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.reranking import Reranker
from pipeline.features.encode_images import encode_images
from pipeline.models.encoder import load_encoder
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.models.matcher import MatcherConfig
from pipeline.models.neighbours import MOST_IMAGES
from pipeline.training.decoder_stage import DecoderOptions, build_decoder
from pipeline.training.validation import search_all
from pipeline.utils.devices import autocast, choose_precision, default_workers, inference_batch_size

STEP_SECONDS, LEAST_STEPS = 2.5, 4
SAMPLED_PICTURES, SEARCHED_PICTURES = 16, 32
# A row of a cache beside its features: name, status, reason, hash.
ROW_BYTES = 2 * FEATURE_SIZE + 250


@dataclass(frozen=True)
class TrainingCost:
    """What training takes.

    Attributes:
        steps: timed.
        epoch: seconds, validation included.
        total: seconds of all epochs.
        disk: bytes of the run folder.
        memory: bytes, or None where the system does not tell.
    """

    steps: int
    epoch: float
    total: float
    disk: float
    memory: float | None


def training_cost(
    options: DecoderOptions,
    captions: EncodedCaptions,
    vocabulary_size: int,
    val_images: int,
    search: SearchConfig,
    features_in_memory: float,
    device: torch.device,
) -> TrainingCost:
    """Train an untrained decoder for some seconds on the real captions and made-up features.

    Args:
        options: as for training.
        captions: those of train.
        vocabulary_size: tokens V.
        val_images: that are captioned after every epoch.
        search: how.
        features_in_memory: their bytes.
        device: where to train.
    """
    decoder = build_decoder(options, vocabulary_size).to(device).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-6)
    generator = torch.Generator().manual_seed(options.seed)
    # Those of a few batches are at hand: made anew for each they would count as training.
    made_up = torch.randn(options.batch_size, FEATURE_SIZE, generator=generator)
    seconds: list[float] = []
    began = time.perf_counter()
    while not _enough(seconds, began):
        for indices in bucketed_batches(captions.lengths, options.batch_size, generator):
            before = time.perf_counter()
            batch = captions.padded(indices).to(device)
            with autocast(device, options.precision):
                loss, tokens = decoder.loss(
                    made_up[: len(batch)].to(device), batch, options.label_smoothing
                )
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # waits for a GPU
            seconds.append(time.perf_counter() - before)
            if _enough(seconds, began):
                break
    timed = seconds[1:]  # the first one has to warm up
    step = sum(timed) / len(timed)
    decoder.eval()
    few = made_up[: max(1, min(val_images, SEARCHED_PICTURES))]
    before = time.perf_counter()
    list(search_all(decoder, [few], search, Reranker()))
    validation = (time.perf_counter() - before) / len(few) * val_images
    training = step * count_batches(len(captions), options.batch_size)
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    matcher = MatcherConfig(vocabulary_size).size * (vocabulary_size + FEATURE_SIZE)
    images = len(captions.first_of_image) - 1
    neighbours = 2 * options.embed_size * min(images, MOST_IMAGES)
    peak = _peak_memory()
    return TrainingCost(
        steps=len(timed),
        epoch=training + validation,
        # A self-critical epoch takes about twice as long.
        total=(training * (options.epochs + options.self_critical_epochs))
        + validation * options.epochs,
        # last.pt has the weights four times, for the optimizer and the running mean.
        disk=4 * (5 * weights + matcher) + 2 * neighbours,
        memory=None if peak is None else peak + features_in_memory,
    )


def _enough(seconds: Sequence[float], began: float) -> bool:
    return len(seconds) >= LEAST_STEPS and time.perf_counter() - began > STEP_SECONDS


def _peak_memory() -> float | None:
    """Give the most bytes that this process had in memory."""
    try:
        import resource
    except ImportError:  # Windows has it not
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(used if sys.platform == "darwin" else 1024 * used)


def extraction_seconds(files: Sequence[ImageRef], images: int, device: torch.device) -> float:
    """Estimate how long so many images take, from a few of them and an untrained encoder."""
    precision = choose_precision("auto", device)
    encoder = load_encoder("random", precision).for_inference().to(device)
    workers = default_workers(device)
    sample = list(files[:: max(1, len(files) // SAMPLED_PICTURES)][:SAMPLED_PICTURES])
    few = sample[: inference_batch_size(device)]
    for _ in encode_images(encoder, few, workers):  # the first batch has to warm up
        pass
    before = time.perf_counter()
    for _ in encode_images(encoder, sample, workers):
        pass
    return (time.perf_counter() - before) / max(1, len(sample)) * images
