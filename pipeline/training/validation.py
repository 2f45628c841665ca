"""Scoring a decoder on a split: loss teacher-forced, captions decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.reranking import Reranker, best_captions
from pipeline.decoding.search import Hypothesis
from pipeline.features.feature_set import FeatureSet
from pipeline.metrics.coco import Scorer
from pipeline.models.ensemble import CaptionDecoder
from pipeline.utils.distributed import SINGLE_PROCESS, World

SAMPLES = 8


def search_all(
    decoder: CaptionDecoder,
    features: Iterable[Tensor],
    config: SearchConfig,
    reranker: Reranker,
) -> Iterator[list[Hypothesis]]:
    """Search captions for features that come in batches (B, 2048), on the decoder's device."""
    device = decoder.feature_mean.device
    for batch in features:
        yield from best_captions(decoder, batch.to(device), config, reranker)


@torch.inference_mode()
def mean_loss(
    decoder: CaptionDecoder,
    captions: EncodedCaptions,
    features: Tensor | FeatureSet,
    batch_size: int = 256,
    world: World = SINGLE_PROCESS,
) -> float:
    """Mean cross-entropy a token, in nats; ``captions.images`` index ``features``.

    The processes of ``job`` share the batches.
    """
    device = decoder.feature_mean.device

    def batch_loss(indices: Tensor) -> tuple[float, int]:
        loss, count = decoder.loss(
            features[captions.images[indices]].to(device), captions.padded(indices).to(device)
        )
        return loss.item(), count

    batches = torch.argsort(captions.lengths, stable=True).split(batch_size)
    total, tokens = 0.0, 0
    for loss, count in world.share_out(batches, batch_loss):
        total += loss
        tokens += count
    return total / max(tokens, 1)


def sample_names(names: Iterable[str]) -> list[str]:
    """Choose eight names, or all of fewer, spread evenly over the sorted ones.

    They follow from the names alone: for a split they are the same in every run.
    """
    ordered = sorted(names)
    count = min(SAMPLES, len(ordered))
    return [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)]


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        scores: ``val_loss``, ``CIDEr-D`` and others by name.
        samples: the captions of a few images by the images' names, always the same images.
    """

    scores: dict[str, float]
    samples: dict[str, str] = field(default_factory=dict)


class Validator:
    """The val split, prepared once: captions as numbers, references for the scorer.

    Captions are searched with three beams, not greedily: greedy scores rank epochs
    otherwise than the search that people use, and were seen to favour early ones. Second
    opinions (``reranking``) are left out, as they would take longer than they tell.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[Sequence[str]]],
        vocabulary: Vocabulary,
        batch_size: int = 256,
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

        The processes of ``job`` share the work batch by batch: the batches of one process, so
        that captions and scores are the same, whatever their number.

        Returns:
            ``val_loss``, the scores of captions searched with three beams, and ``distinct``,
            the number of different captions; and the captions of ``samples``.
        """

        def search(images: Tensor) -> list[list[int]]:
            found = search_all(decoder, [features[images]], self.search, Reranker())
            return [hypotheses[0].tokens for hypotheses in found]

        batches = torch.arange(len(self.names)).split(self.batch_size)
        captions = [tokens for batch in world.share_out(batches, search) for tokens in batch]
        predictions = {
            name: self.vocabulary.decode(tokens)
            for name, tokens in zip(self.names, captions, strict=True)
        }
        scores = {
            "val_loss": mean_loss(decoder, self.captions, features, world=world),
            **world.broadcast(lambda: self.scorer.score(predictions)),
            "distinct": len({tuple(words) for words in predictions.values()}),
        }
        write = self.vocabulary.detokenize
        return Validation(scores, {name: write(predictions[name]) for name in self.samples})
