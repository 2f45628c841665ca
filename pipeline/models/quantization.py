"""Weights in fewer bits, for storage only: computation uses float32.

Symmetric, one scale per filter (Krishnamoorthi, arXiv 1806.08342, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LARGEST = 127  # -128 is unused: the scale is the same on both sides of zero


def quantize(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Round the filters of a state dict, its tensors (O, I, H, W), to 8 bits.

    Returns:
        The state dict with int8 filters, and the scales of the filters, float32 (O,), by name.
    """
    rounded, scales = dict(weights), {}
    for name, tensor in weights.items():
        if tensor.dim() == 4:
            values = tensor.float()
            scale = values.abs().amax(dim=(1, 2, 3)).div(LARGEST).clamp_min(1e-30)
            rounded[name] = values.div(scale[:, None, None, None]).round().to(torch.int8)
            scales[name] = scale
    return rounded, scales


def dequantize(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``quantize``; LookupError or RuntimeError if weights and scales do not fit."""
    whole = dict(weights)
    for name, scale in scales.items():
        whole[name] = weights[name].float().mul_(scale[:, None, None, None])
    return whole


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert all weights to ``dtype``; a matrix with two names (tied embeddings) stays shared."""
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in weights.items()}
    converted = {places[name]: tensor.to(dtype) for name, tensor in weights.items()}
    return {name: converted[place] for name, place in places.items()}
