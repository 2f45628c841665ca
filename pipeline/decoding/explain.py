"""Where a captioner looks: the contribution of each part of an image to each caption word.

The decoder reads the mean of the 8 x 8 cells of InceptionV3's last layer, so each cell's share of
that mean is known. To first order, a cell's contribution to a word's log-probability is the
gradient times the cell's difference from the average training image: gradient x input (Shrikumar et
al., arXiv 1605.01713), on the layer that Grad-CAM uses (Selvaraju et al., arXiv 1610.02391).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from pipeline.datasets.vocabulary import START_ID
from pipeline.models.encoder import CELLS
from pipeline.models.ensemble import CaptionDecoder


@dataclass(frozen=True)
class Explanation:
    """A caption, and the evidence in the image for each of its words.

    Attributes:
        text: the caption.
        words: its tokens.
        probabilities: of each token, given the image and the preceding tokens, float32 (T,).
        maps: contribution of each image part to the log-probability of each token, in nats,
            float32 (T, 8, 8); negative values are evidence against the token.
    """

    text: str
    words: tuple[str, ...]
    probabilities: numpy.ndarray
    maps: numpy.ndarray


def word_maps(decoder: CaptionDecoder, cells: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return each image cell's contribution to the log-probability of each caption token.

    A token's map sums to the first-order effect of this image relative to the average one.

    Args:
        decoder: in eval mode.
        cells: the encoder's output before pooling, float32 (64, 2048).
        tokens: T token ids, without <start> and <end>.

    Returns:
        Nats, float32 (T, 64).
    """
    count = len(tokens)
    if not count:
        return torch.zeros(0, CELLS**2)
    # One row per token, so a single backward pass yields all gradients.
    features = cells.mean(0).expand(count, -1).clone().requires_grad_()
    target = torch.tensor(tokens, device=cells.device)
    before = torch.cat([target.new_tensor([START_ID]), target[:-1]]).expand(count, -1)
    with torch.backends.cudnn.flags(enabled=False):  # its LSTM has no backward pass in eval mode
        logits = decoder.next_logits(features, before, torch.arange(count, device=cells.device))
    chosen = logits.float().log_softmax(1).gather(1, target.unsqueeze(1))
    (gradient,) = torch.autograd.grad(chosen.sum(), features)  # (T, 2048)
    return (gradient @ (cells - decoder.feature_mean).t() / len(cells)).detach()
