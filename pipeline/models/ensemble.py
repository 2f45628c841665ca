"""An ensemble of decoders (Vinyals et al., arXiv 1609.06647, section 5).

At every word the members' logits are averaged, which gives the normalized geometric mean of their
probabilities. All members read the same features. An ensemble has the interface of a ``Decoder``;
its image embedding and state are those of its members, concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.models.decoder import Decoder, DecoderConfig, State


class Ensemble(nn.Module):
    """``config.members`` decoders of the same sizes, vocabulary and encoder."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoders = [Decoder(config) for _ in range(config.members)]
        self.members = nn.ModuleList(self.decoders)

    @property
    def feature_mean(self) -> Tensor:
        """The mean of the features, (2048,): all members were trained on the same images."""
        return self.decoders[0].feature_mean

    @property
    def feature_scale(self) -> Tensor:
        """The scale of the features, (2048,)."""
        return self.decoders[0].feature_scale

    def embed_image(self, features: Tensor) -> tuple[Tensor, State]:
        """Map features (B, 2048) to the members' image embeddings, (B, 1, sum of E), and states."""
        images, states = zip(*(m.embed_image(features) for m in self.decoders), strict=True)
        return torch.cat(images, dim=2), join_states(states)

    def next_logits(self, features: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Return the mean of the members' logits, see ``Decoder.next_logits``."""
        logits = [m.next_logits(features, tokens, places) for m in self.decoders]
        return torch.stack(logits).mean(0)

    def loss(
        self, features: Tensor, captions: Tensor, label_smoothing: float = 0.0
    ) -> tuple[Tensor, int]:
        """Return the mean of the members' losses, see ``Decoder.loss``."""
        losses = [m.loss(features, captions, label_smoothing) for m in self.decoders]
        return torch.stack([loss for loss, _ in losses]).mean(0), losses[0][1]

    @torch.inference_mode()
    def start(self, features: Tensor) -> State:
        """Feed the images (B, 2048) to all members; return their states, (B, sum of H)."""
        return join_states([member.start(features) for member in self.decoders])

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token per sequence, int64 (B,); see ``Decoder.step``."""
        parts = zip(*(part.chunk(len(self.decoders), dim=1) for part in state), strict=True)
        logits, states = zip(
            *(m.step(tokens, part) for m, part in zip(self.decoders, parts, strict=True)),
            strict=True,
        )
        # Logits differ from log-probabilities by a constant per row, which normalizing removes.
        return torch.stack(logits).mean(0), join_states(states)


def join_states(states: Sequence[State]) -> State:
    """Concatenate the states of an ensemble's members."""
    hidden, cell = zip(*states, strict=True)
    return torch.cat(hidden, dim=1), torch.cat(cell, dim=1)


CaptionDecoder = Decoder | Ensemble


def make_decoder(config: DecoderConfig) -> CaptionDecoder:
    """Build a decoder or an ensemble with untrained weights."""
    return Decoder(config) if config.members == 1 else Ensemble(config)
