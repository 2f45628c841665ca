"""Comparison of state dicts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Fail unless both have the same names, types and numbers, to the bit."""
    torch.testing.assert_close(dict(first), dict(second), rtol=0, atol=0)
