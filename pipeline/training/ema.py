"""The exponential moving average (EMA) of the weights: the model that is scored and saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """A moving average of weights over optimizer steps; empty if ``decay`` is 0.

    The decay rises from 0.1 to its full value, or else the average would keep the random start.

    Attributes:
        shadow: the average, or, while ``swap`` is in effect, the trained weights.
        steps: optimizer steps averaged so far.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters) if decay else []
        self.decay = decay
        self.shadow = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Average in the weights after an optimizer step."""
        if self.shadow:
            self.steps += 1
            decay = min(self.decay, self.steps / (self.steps + 9))
            torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the trained weights and the average."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            trained = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(trained)

    @torch.no_grad()
    def load(self, trained: Sequence[Tensor], steps: int) -> None:
        """Restore the state; the parameters hold the average, ``trained`` the other weights."""
        for shadow, saved in zip(self.shadow, trained, strict=True):
            shadow.copy_(saved)
        self.swap()
        self.steps = steps
