"""Scoring a decoder on val: teacher-forced loss, and scores of decoded captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.datasets.caption_table import CaptionTable
from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions, tokenized
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.reranking import Reranker, best_captions
from pipeline.features.feature_set import FeatureSet
from pipeline.metrics.coco import Scorer
from pipeline.models.ensemble import CaptionDecoder
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError

BATCH_SIZE = 256
SAMPLES = 8  # val images whose captions are logged after every epoch
Tokenized = dict[str, list[list[str]]]  # image name -> tokens of each caption


def split_captions(table: CaptionTable, tokenizer: str, what: str) -> tuple[Tokenized, Tokenized]:
    """Return the tokenized captions of train and val.

    Raises:
        UserError: a split has no image; the message calls it ``what``.
    """
    train, val = (tokenized(table.of_split(split), tokenizer) for split in ("train", "val"))
    for split, images in (("train", train), ("val", val)):
        if not images:
            raise UserError(f"{table.source}: no {what} is in the {split} split")
    return train, val


@torch.inference_mode()
def mean_loss(
    decoder: CaptionDecoder,
    captions: EncodedCaptions,
    features: Tensor | FeatureSet,
    world: World = SINGLE_PROCESS,
) -> float:
    """Return the mean cross-entropy per token, in nats; ``captions.images`` index ``features``.

    The processes of ``world`` share the batches.
    """
    device = decoder.feature_mean.device

    def batch_loss(indices: Tensor) -> tuple[float, int]:
        loss, count = decoder.loss(
            features[captions.images[indices]].to(device), captions.padded(indices).to(device)
        )
        return loss.item(), count

    batches = torch.argsort(captions.lengths, stable=True).split(BATCH_SIZE)
    total, tokens = 0.0, 0
    for loss, count in world.share_out(batches, batch_loss):
        total += loss
        tokens += count
    return total / max(tokens, 1)


def sample_names(names: Iterable[str]) -> list[str]:
    """Choose at most eight names, evenly spaced in sorted order; always the same for a split."""
    ordered = sorted(names)
    count = min(SAMPLES, len(ordered))
    return [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)]


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
        scores: ``val_loss``, ``CIDEr-D`` and others by name.
        samples: captions of a few images by image name, always the same images.
    """

    scores: dict[str, float]
    samples: dict[str, str] = field(default_factory=dict)


class Validator:
    """The val split, prepared once: captions as token ids, references for the scorer.

    Captions are decoded with three beams: greedy decoding ranks epochs differently from the
    default search and was seen to favour early ones. Reranking is left out to save time.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[Sequence[str]]],
        vocabulary: Vocabulary,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.names = list(references)
        self.samples = sample_names(self.names)
        self.scorer = Scorer(references)
        self.captions = encode_captions(references.values(), vocabulary)
        self.vocabulary = vocabulary
        self.batch_size = batch_size
        self.search = SearchConfig(max_length=vocabulary.tokenizer.longest)

    def validate(
        self,
        decoder: CaptionDecoder,
        features: Tensor | FeatureSet,
        world: World = SINGLE_PROCESS,
    ) -> Validation:
        """Score ``decoder`` on features (N, 2048), one row for each of ``names``.

        The processes of ``world`` share the batches that a single process would use, so captions
        and scores do not depend on the number of processes.

        Returns:
            ``val_loss``, caption scores, ``distinct`` (the number of different captions), and the
            captions of ``samples``.
        """
        device = decoder.feature_mean.device

        def search(images: Tensor) -> list[list[int]]:
            found = best_captions(decoder, features[images].to(device), self.search, Reranker())
            # NaN weights yield no captions; their loss ends the training.
            return [hypotheses[0].tokens if hypotheses else [] for hypotheses in found]

        batches = torch.arange(len(self.names)).split(self.batch_size)
        captions = [tokens for batch in world.share_out(batches, search) for tokens in batch]
        predictions = {
            name: self.vocabulary.decode(tokens)
            for name, tokens in zip(self.names, captions, strict=True)
        }
        scores = {
            "val_loss": mean_loss(decoder, self.captions, features, world),
            **world.broadcast(lambda: self.scorer.score(predictions)),
            "distinct": len({tuple(words) for words in predictions.values()}),
        }
        write = self.vocabulary.detokenize
        return Validation(scores, {name: write(predictions[name]) for name in self.samples})
