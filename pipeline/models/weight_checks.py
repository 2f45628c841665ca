"""Whether tensors from a file are what is wanted: names, shapes, types, and numbers of use.

All raise ``ValueError``, whose text is for users; names and values from the file are in it as
printable characters, and few of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# Features (up to 65504) times their scale, times two matrices, are below float32's 3e38 with such
# numbers. A scale is up to 1e7: where all features are the same.
LARGEST_WEIGHT = 2e7


def check_state(given: Any, shapes: Mapping[str, torch.Size], what: str) -> None:
    """Raise ValueError unless a state dict has these names and shapes, and floats.

    Args:
        given: what should be one.
        shapes: of its tensors, by name.
        what: whose it is.
    """
    check_names(given, shapes, f"of the {what}")
    for name, shape in shapes.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            raise ValueError(f"{name} of the {what} has not the shape {tuple(shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} of the {what} is of the type {tensor.dtype}")


def check_values(weights: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError unless all numbers are finite, and small enough to compute with."""
    for name, tensor in weights.items():
        if not tensor.numel():
            raise ValueError(f"{name} of the {what} is empty")
        low, high = torch.aminmax(tensor)  # NaN where there is one
        if not (float(low) >= -LARGEST_WEIGHT and float(high) <= LARGEST_WEIGHT):
            raise ValueError(f"{name} of the {what} holds infinite or very large numbers")


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Give the shapes of a module's state dict, by name."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def check_names(given: Any, names: Collection[str], what: str, all_of_them: bool = True) -> None:
    """Raise ValueError unless ``given`` is a dictionary with these names."""
    if not isinstance(given, dict):
        raise ValueError(f"what there is {what} is no dictionary")
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise ValueError(f"{short(unknown)} {what} is unknown")
    missing = next((name for name in names if name not in given), None)
    if missing is not None and all_of_them:
        raise ValueError(f"{missing} {what} is missing")


def short(value: Any) -> str:
    """Say what a value is in a few printable characters."""
    if isinstance(value, str):
        return ascii(value[:60])
    return str(value)[:60] if type(value) in (int, float, bool) else f"a {type(value).__name__}"
