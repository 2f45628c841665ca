"""Self-critical training: the decoder samples captions and learns from their CIDEr-D.

Rennie et al. (arXiv 1612.00563): a sampled caption with reward r has the loss
-(r - b) log p(caption). The baseline b is the mean reward of the other captions sampled for the
same image (Luo, arXiv 2003.09971), which saves a greedy search per image. In the reward, <end>
counts as a token; otherwise the decoder learns to stop mid-sentence. In scores it never counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions, pad_captions
from pipeline.datasets.vocabulary import END_ID, START_ID
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.sampling import sample
from pipeline.metrics.cider import Idf, cider_d, ngrams
from pipeline.models.decoder import Decoder

SAMPLES = 5  # captions sampled per image, as many as Flickr8k has references


class Reward:
    """CIDEr-D of sampled captions against the training captions of their images.

    Document frequencies are those of all training images. TF-IDF vectors of the references are
    computed on demand: storing them would take many times the memory of the captions.
    """

    def __init__(self, captions: EncodedCaptions) -> None:
        self._all = captions
        self._idf = Idf(
            {ngram for caption in self._captions(image) for ngram in ngrams(caption)}
            for image in range(len(captions.first_of_image) - 1)
        )

    def _captions(self, image: int) -> list[list[int]]:
        """Return the captions of an image as token ids, without <start>, with <end>."""
        first, last = self._all.first_of_image[image : image + 2]
        bounds = self._all.offsets[first : last + 1].tolist()
        return [
            self._all.tokens[start + 1 : end].tolist() for start, end in itertools.pairwise(bounds)
        ]

    def __call__(self, image: int, sampled: Sequence[Sequence[int]]) -> list[float]:
        """Return the CIDEr-D, 0 to 10, of one image's captions, given without <start> and <end>."""
        references = [self._idf.tf_idf(ngrams(caption)) for caption in self._captions(image)]
        candidates = [self._idf.tf_idf(ngrams([*tokens, END_ID])) for tokens in sampled]
        return [cider_d(candidate, references) / 100 for candidate in candidates]


@dataclass
class SelfCritical:
    """The loss of self-critical training.

    Attributes:
        captions: the training captions.
        cross_entropy_weight: weight of the cross-entropy of one training caption per image, which
            keeps captions grammatical where CIDEr-D does not measure it.
        search: limits the lengths of sampled captions.
        reward_sum, sampled: sum of the rewards, and number of captions, since ``reset``.
    """

    captions: EncodedCaptions
    cross_entropy_weight: float
    search: SearchConfig = field(default_factory=SearchConfig)
    reward_sum: float = 0.0
    sampled: int = 0

    def __post_init__(self) -> None:
        self.reward = Reward(self.captions)

    def reset(self) -> None:
        """Reset the sums for a new epoch."""
        self.reward_sum, self.sampled = 0.0, 0

    def loss(
        self, decoder: Decoder, features: Tensor, images: Tensor, label_smoothing: float
    ) -> tuple[Tensor, int]:
        """Sample captions for a batch of images, and sum their loss.

        Args:
            decoder: in training mode; captions are sampled without dropout.
            features: float (B, 2048), on the decoder's device.
            images: int64 (B,): image numbers.
            label_smoothing: of the cross-entropy.

        Returns:
            The summed loss, and the number of sampled captions.
        """
        decoder.eval()
        sampled = [
            [hypothesis.tokens for hypothesis in group]
            for group in sample(decoder, features, SAMPLES, self.search)
        ]
        decoder.train()
        groups = zip(images.tolist(), sampled, strict=True)
        rewards = torch.tensor([self.reward(*group) for group in groups])  # (B, SAMPLES)
        self.reward_sum += float(rewards.sum())
        self.sampled += rewards.numel()
        baseline = (rewards.sum(1, keepdim=True) - rewards) / (SAMPLES - 1)
        captions = pad_captions(
            [START_ID, *tokens, END_ID] for group in sampled for tokens in group
        )
        loss, _ = decoder.loss(
            features.repeat_interleave(SAMPLES, 0),
            captions.to(features.device),
            weights=(rewards - baseline).flatten().to(features.device),
        )
        if self.cross_entropy_weight:
            first = self.captions.first_of_image
            counts = first[images + 1] - first[images]
            chosen = first[images] + (torch.rand(len(images)) * counts).long()
            cross_entropy, _ = decoder.loss(
                features, self.captions.padded(chosen).to(features.device), label_smoothing
            )
            loss = loss + self.cross_entropy_weight * SAMPLES * cross_entropy
        return loss, rewards.numel()
