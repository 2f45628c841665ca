"""Identity of the encoder that made some features. No torch import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderIdentity:
    """The encoder that made some features; its fields are stored in caches and checkpoints.

    Attributes:
        encoder: the network's name.
        weights_sha256: hash of its weights, see ``encoder.weights_sha256``.
        transform: how an image is converted to the network's input.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        weights_source: ``imagenet``, ``pretrained``, ``random`` or a file.
        torchvision: the version that built the network.
        engine: what ran the network: ``torch`` or ``openvino``.
    """

    encoder: str
    weights_sha256: str
    transform: str
    precision: str
    weights_source: str
    torchvision: str
    engine: str = "torch"

    def mismatch(self, other: EncoderIdentity) -> str | None:
        """Return how two encoders differ, rounding of the features aside, or None."""
        for field in ("encoder", "weights_sha256", "transform"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field.replace('_', ' ')} {mine[:20]} against {theirs[:20]}"
        return None


FEATURE_SIZE = 2048
