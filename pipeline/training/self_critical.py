"""Self-critical training: the decoder draws captions itself and learns from their CIDEr-D.

Rennie et al. (arXiv 1612.00563): a drawn caption with reward r gets the loss
-(r - b) log p(caption). The baseline b is the mean reward of the other captions drawn for the
same image (Luo, arXiv 2003.09971), which spares a search for each. <end> counts as a token
in the reward, as captions otherwise learn to break off; it never does in a score.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.datasets.encoded_captions import EncodedCaptions
from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.search import sample
from pipeline.metrics.cider import Idf, Weighed, cider_d, ngrams
from pipeline.models.decoder import Decoder

# Captions drawn for an image, as many as Flickr8k's people wrote.
SAMPLES = 5


class Reward:
    """CIDEr-D of drawn captions against the training captions of their images.

    Document frequencies are those of all training images. The captions themselves are weighed
    when they are asked for: kept, they would take many times the memory of their numbers.
    """

    def __init__(self, captions: EncodedCaptions) -> None:
        self._tokens = captions.tokens
        self._offsets = captions.offsets
        self._first = captions.first_of_image
        self._rarity = Idf(self._ngrams_of_images())

    def _ngrams_of_images(self) -> Iterator[set[tuple[object, ...]]]:
        for image in range(len(self._first) - 1):
            yield {ngram for caption in self._captions(image) for ngram in ngrams(caption)}

    def _captions(self, image: int) -> list[list[int]]:
        """Give the captions of an image as numbers, without <start>, with <end>."""
        first, last = int(self._first[image]), int(self._first[image + 1])
        bounds = self._offsets[first : last + 1].tolist()
        tokens = self._tokens[bounds[0] : bounds[-1]].tolist()
        return [
            tokens[start + 1 - bounds[0] : end - bounds[0]]
            for start, end in itertools.pairwise(bounds)
        ]

    def __call__(self, image: int, drawn: Sequence[Sequence[int]]) -> list[float]:
        """Reward captions, without <start> and <end>, of one image: CIDEr-D from 0 to 10."""
        references = [self._weigh(caption) for caption in self._captions(image)]
        return [cider_d(self._weigh([*tokens, END_ID]), references) / 100 for tokens in drawn]

    def _weigh(self, tokens: Sequence[int]) -> Weighed:
        return self._rarity.weigh(ngrams(tokens))


@dataclass
class SelfCritical:
    """The loss of self-critical training.

    Attributes:
        captions: the training captions.
        truth: weight of the ordinary loss of one training caption an image: it keeps the
            captions sound where CIDEr-D does not look.
        search: the lengths that drawn captions may have.
        rewards, drawn: sum of the rewards, and number of captions, since ``reset``.
    """

    captions: EncodedCaptions
    truth: float
    search: SearchConfig = field(default_factory=SearchConfig)
    rewards: float = 0.0
    drawn: int = 0

    def __post_init__(self) -> None:
        self.reward = Reward(self.captions)
        self.first = self.captions.first_of_image

    def reset(self) -> None:
        """Begin to count anew."""
        self.rewards, self.drawn = 0.0, 0

    @property
    def mean_reward(self) -> float:
        """The mean CIDEr-D, in percent, of the captions drawn since ``reset``."""
        return 100 * self.rewards / max(1, self.drawn)

    def loss(
        self, decoder: Decoder, features: Tensor, images: Tensor, label_smoothing: float
    ) -> tuple[Tensor, int]:
        """Draw captions for some images, and sum their loss.

        Args:
            decoder: in training mode. Captions are drawn without dropout.
            features: float (B, 2048), on the decoder's device.
            images: int64 (B,): the images' numbers.
            label_smoothing: of the ordinary loss.

        Returns:
            The loss, and the number of drawn captions that it is a sum over.
        """
        decoder.eval()
        drawn = [
            [hypothesis.tokens for hypothesis in group]
            for group in sample(decoder, features, SAMPLES, self.search)
        ]
        decoder.train()
        rewards = torch.tensor(
            [self.reward(image, group) for image, group in zip(images.tolist(), drawn, strict=True)]
        )  # (B, SAMPLES)
        self.rewards += float(rewards.sum())
        self.drawn += rewards.numel()
        baseline = (rewards.sum(1, keepdim=True) - rewards) / (SAMPLES - 1)
        captions = pad_sequence(
            [torch.tensor([START_ID, *tokens, END_ID]) for group in drawn for tokens in group],
            batch_first=True,
            padding_value=PAD_ID,
        )
        loss, _ = decoder.loss(
            features.repeat_interleave(SAMPLES, 0),
            captions.to(features.device),
            weights=(rewards - baseline).flatten().to(features.device),
        )
        if self.truth:
            counts = self.first[images + 1] - self.first[images]
            chosen = self.first[images] + (torch.rand(len(images)) * counts).long()
            truth, _ = decoder.loss(
                features, self.captions.padded(chosen).to(features.device), label_smoothing
            )
            loss = loss + self.truth * SAMPLES * truth
        return loss, rewards.numel()
