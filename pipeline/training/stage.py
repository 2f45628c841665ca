"""How long and how fast to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.models.checkpoint import Checkpoint
from pipeline.training.validation import Validation


@dataclass(frozen=True)
class Phase:
    """Epochs over which the learning rate rises and falls once.

    Attributes:
        epochs: how many.
        rate: times the stage's full learning rates.
        divisor: what a batch's summed loss is divided by; 0: the number of its own tokens. Where
            batches are of captions of like length, their own number would make a word of a short
            caption count more than one of a long caption.
    """

    epochs: int
    rate: float = 1.0
    divisor: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train.

    Attributes:
        phases: of passes over the training captions, one after the other.
        patience: stop after so many epochs without a better CIDEr-D; 0 never stops.
        warmup: share of a phase's steps over which the learning rate rises from zero.
        clip: largest norm of the gradient.
        grad_accum_steps: batches whose gradients are summed before a step.
        ema_decay: decay of a running mean of the weights, which is what is scored and saved as the
            model (Polyak averaging, exponential); 0 keeps none.
        seed: of everything random.
        precision: of the network's arithmetic in training: fp32 or bf16.
    """

    phases: tuple[Phase, ...]
    patience: int
    seed: int
    precision: str
    warmup: float = 0.02
    clip: float = 5.0
    grad_accum_steps: int = 1
    ema_decay: float = 0.0

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)

    def phase_of(self, epoch: int) -> tuple[Phase, int]:
        """Find the phase of an epoch, counted from 1, and how many of its epochs come before."""
        before = epoch - 1
        for phase in self.phases:
            if before < phase.epochs:
                return phase, before
            before -= phase.epochs
        raise ValueError(f"no epoch {epoch} in {self.phases}")


class Stage(Protocol):
    """What the loop needs to know of a stage.

    In a job of several processes each has the stage, with the same weights.
    """

    device: torch.device

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the optimizer's groups, each with ``params``, ``lr`` and ``weight_decay``."""

    def batches_per_epoch(self, epoch: int) -> int:
        """Say how many batches ``batches`` gives."""

    def batches(self, epoch: int) -> Iterator[Any]:
        """Give the batches of an epoch, in an order that depends on seed and epoch alone.

        Each process gives its share of every batch, or None where that is empty.
        """

    def set_training(self, training: bool) -> None:
        """Switch dropout and the like on or off."""

    def loss(self, batch: Any) -> tuple[Tensor, int]:
        """Give the summed loss of a batch, and of how many tokens or captions it is."""

    def facts(self) -> dict[str, float]:
        """Give what else is to be logged of the epoch that was trained last, of all processes."""

    def validate(self) -> Validation:
        """Score the present weights on val; one of the scores is ``CIDEr-D``.

        Processes may share the work; all of them get the same.
        """

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Describe the present weights, without what is needed to go on training."""


# ``Stage.loss``, or the same in a job of several processes.
Loss = Callable[[Any], tuple[Tensor, int]]


class LossError(Exception):
    """A loss that cannot be trained with; the text says why."""


# What is called after every epoch with its line of the log and its sample captions by name.
EpochCallback = Callable[[Mapping[str, float], Mapping[str, str]], None]
