"""Image-text matching: how well a caption fits an image, for reranking the decoder's candidates.

Images and captions are embedded in one space, where a caption is nearer to its own image than to
others (Kiros et al., arXiv 1411.2539; with the loss of CLIP, Radford et al., arXiv 2103.00020).
A caption is the weighted mean of its word vectors: word order is left to the decoder. The matcher
rewards what distinguishes this image from others; the decoder prefers captions that fit many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.datasets.encoded_captions import pad_captions
from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID
from pipeline.models.decoder import dropout
from pipeline.models.encoder_identity import FEATURE_SIZE

FEATURE_DROPOUT, WORD_DROPOUT = 0.5, 0.2
FIRST_TEMPERATURE = 0.07


@dataclass(frozen=True)
class MatcherConfig:
    """Sizes of a matcher: tokens V, width D of the shared space, width of the features."""

    vocabulary_size: int
    size: int = 512
    feature_size: int = FEATURE_SIZE


class Matcher(nn.Module):
    """Embeddings of images and of captions in one space."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_mean", torch.zeros(config.feature_size))
        self.register_buffer("feature_scale", torch.ones(config.feature_size))
        self.image_embedding = nn.Linear(config.feature_size, config.size)
        self.word_embedding = nn.Embedding(config.vocabulary_size, config.size)
        nn.init.normal_(self.word_embedding.weight, std=0.1)
        # The logarithm of a word's weight: "trampoline" matters more than "a".
        self.word_weight = nn.Parameter(torch.zeros(config.vocabulary_size))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(FIRST_TEMPERATURE)))

    def embed_images(self, features: Tensor) -> Tensor:
        """Map features (B, 2048) to the shared space: (B, D), of unit norm."""
        standard = (features - self.feature_mean) * self.feature_scale
        standard = dropout(standard, FEATURE_DROPOUT, self.training)
        return F.normalize(self.image_embedding(standard), dim=1)

    def embed_captions(self, captions: Tensor) -> Tensor:
        """Map padded captions, int64 (C, T), to the shared space: (C, D), of unit norm."""
        counts = (captions != PAD_ID) & (captions != START_ID) & (captions != END_ID)
        if self.training:
            counts = counts & (torch.rand(captions.shape, device=counts.device) >= WORD_DROPOUT)
        weights = self.word_weight[captions].exp() * counts
        means = torch.einsum("ct,ctd->cd", weights, self.word_embedding(captions))
        return F.normalize(means, dim=1, eps=1e-6)

    def loss(self, features: Tensor, captions: Tensor, images: Tensor) -> Tensor:
        """Return the mean cross-entropy of image-to-caption plus caption-to-image retrieval.

        Args:
            features: float (B, 2048), one row for each caption.
            captions: int64 (B, T), padded.
            images: int64 (B,): the image of each caption; several may share one.
        """
        cosines = self.embed_images(features) @ self.embed_captions(captions).t()
        logits = self.log_scale.exp() * cosines  # (B, B)
        same = (images.unsqueeze(1) == images).float()
        targets = same / same.sum(1, keepdim=True)
        both = targets * (logits.log_softmax(1) + logits.log_softmax(0))
        return -both.sum(1).mean()

    @torch.inference_mode()
    def fit(self, features: Tensor, candidates: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
        """Return, per image, its captions' cosines (C,) with it, -1 to 1: float32, on the CPU.

        Args:
            features: float (B, 2048).
            candidates: for each image its captions, as word ids.
        """
        padded = pad_captions(words for group in candidates for words in group)
        images = self.embed_images(features)
        groups = self.embed_captions(padded.to(images.device)).split([len(g) for g in candidates])
        return [(group @ image).cpu() for group, image in zip(groups, images, strict=True)]
