"""Training the image-text matcher on cached features."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions
from pipeline.features.feature_set import FeatureSet
from pipeline.models.ensemble import CaptionDecoder
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.utils.progress import progress_bar

# An embedding size of 1024, other dropout rates or twice the batch size rerank val captions equally
# well, within noise.
EPOCHS = 10
BATCH_SIZE = 512
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
MAX_STEPS = 4000  # for millions of captions


def train_matcher(
    features: Tensor | FeatureSet,
    captions: EncodedCaptions,
    decoder: CaptionDecoder,
    seed: int,
) -> Matcher:
    """Train a matcher on training images and their captions.

    Args:
        features: image features, by image number.
        captions: their captions.
        decoder: gives the sizes, the device, and the mean and scale that standardize the features.
        seed: of initial weights, order and dropout.
    """
    torch.manual_seed(seed)
    config, device = decoder.config, decoder.feature_mean.device
    matcher = Matcher(MatcherConfig(config.vocabulary_size, feature_size=config.feature_size))
    matcher.feature_mean.copy_(decoder.feature_mean)
    matcher.feature_scale.copy_(decoder.feature_scale)
    matcher.to(device).train()
    optimizer = torch.optim.AdamW(
        matcher.parameters(),
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        fused=device.type in ("cpu", "cuda"),
    )
    batches = -(-len(captions) // BATCH_SIZE)
    steps = min(EPOCHS * batches, MAX_STEPS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in progress_bar(range(steps), desc="matcher", unit="batch", leave=False):
        if not len(order):
            order = torch.randperm(len(captions))
        indices, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        images = captions.images[indices]
        loss = matcher.loss(
            features[images].float().to(device),
            captions.padded(indices).to(device),
            images.to(device),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return matcher.eval()
