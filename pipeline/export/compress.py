"""A captioner as one small file: 8-bit encoder, 16-bit decoder and matcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.models.checkpoint import encoder_of, load_ensemble, save_checkpoint
from pipeline.models.encoder import Encoder, load_trunk
from pipeline.models.pretrained import PRETRAINED
from pipeline.models.quantization import dequantize, quantize

# Paths of the training machine mean nothing elsewhere.
DEFAULT_PATHS: dict[str, Any] = {
    "data": "data/flickr8k",
    "features": "data/features/flickr8k.h5",
    "captions": None,
    "weights": None,
    "start": [],
}


def save_compressed(runs: Sequence[Path], target: Path, weights: str | None = None) -> None:
    """Write one run, or several as an ensemble, as one small self-contained file.

    Args:
        runs: run folders or checkpoints, see ``checkpoint.load_ensemble``.
        weights: the encoder's weights, if they moved since the training.

    Raises:
        UserError: checkpoints are missing or have different encoders; the encoder's weights are
            not available.
    """
    checkpoint = load_ensemble(runs)
    checkpoint.encoder_weights = encoder_of(checkpoint, weights, "fp32").trunk_weights()
    # The rounded encoder counts as another one: features of the two must not be mixed.
    encoder = Encoder()
    load_trunk(encoder, dequantize(*quantize(checkpoint.encoder_weights)), PRETRAINED)
    checkpoint.encoder = encoder.identity
    settings = checkpoint.settings
    settings |= {name: value for name, value in DEFAULT_PATHS.items() if name in settings}
    save_checkpoint(target, checkpoint, compress=True)
