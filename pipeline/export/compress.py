"""A captioner as one small file: 8-bit encoder, 16-bit decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.models.pretrained import PRETRAINED


def save_compressed(runs: Sequence[Path], target: Path, weights: str | None = None) -> None:
    """Write one small file that captions by itself, of a run or of several together.

    Args:
        runs: run folders or checkpoints, see ``checkpoint.load_together``.
        target: the file to write.
        weights: the encoder's weights, where a run of stage 2 no longer finds them.

    Raises:
        UserError: no such checkpoints, or not of one encoder; its weights cannot be had.
    """
    import torch

    from pipeline.captioner import encoder_of
    from pipeline.models.checkpoint import checkpoint_content, load_ensemble, write_content
    from pipeline.models.encoder import Encoder, load_trunk
    from pipeline.models.quantization import cast, dequantize, quantize

    checkpoint = load_ensemble(runs)
    whole = encoder_of(checkpoint, weights, "fp32").trunk.state_dict()
    rounded, scales = quantize({name: tensor.contiguous() for name, tensor in whole.items()})
    # The rounded encoder is another one: features of the two must not be mixed.
    encoder = Encoder()
    load_trunk(encoder, dequantize(rounded, scales), PRETRAINED)
    checkpoint.encoder = encoder.identity
    checkpoint.training = None
    # Where the files were in training tells others nothing.
    elsewhere: dict[str, Any] = {
        "data": "data/flickr8k",
        "features": "data/features/flickr8k.h5",
        "captions": None,
        "weights": None,
        "start": [],
    }
    checkpoint.settings |= {k: v for k, v in elsewhere.items() if k in checkpoint.settings}
    content = checkpoint_content(checkpoint)
    content["encoder_weights"], content["encoder_scales"] = rounded, scales
    content["decoder_weights"] = cast(checkpoint.decoder_weights, torch.float16)
    if content["matcher"] is not None:
        content["matcher"]["weights"] = cast(content["matcher"]["weights"], torch.float16)
    write_content(target, content)
