"""A running mean of the weights, which is the model that is scored and saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """A running mean of weights over the steps of training, or nothing where decay is 0.

    The decay rises from 0.1 to its full value, as the mean would else hold on to the random start.

    Attributes:
        others: what is not in the parameters now: the mean, or the trained weights while the
            mean stands in for them.
        steps: how many there were.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters) if decay else []
        self.decay = decay
        self.others = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    def update(self) -> None:
        """Take in the weights after a step."""
        if self.others:
            self.steps += 1
            decay = min(self.decay, self.steps / (self.steps + 9))
            with torch.no_grad():
                torch._foreach_lerp_(self.others, self.parameters, 1 - decay)

    def exchange(self) -> None:
        """Put the mean in place of the trained weights, or those back."""
        for parameter, other in zip(self.parameters, self.others, strict=True):
            trained = parameter.detach().clone()
            parameter.data.copy_(other)
            other.copy_(trained)

    def load(self, trained: list[Tensor], steps: int) -> None:
        """Go on from a checkpoint, whose model has the mean: ``trained`` are the others."""
        for parameter, other, saved in zip(self.parameters, self.others, trained, strict=True):
            other.copy_(parameter.detach())
            parameter.data.copy_(saved)
        self.steps = steps
