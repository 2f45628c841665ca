"""What the training loop needs of a stage: model, data and loss; and how long and fast to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.models.checkpoint import Checkpoint
from pipeline.training.options import TrainingOptions
from pipeline.training.validation import Validation

SEED_STRIDE = 1_000_003  # between the random seeds of epochs; larger than anybody's range of seeds

Loss = Callable[[Any], tuple[Tensor, int]]
# Called after every epoch with its record in the log and its sample captions by image name.
EpochCallback = Callable[[Mapping[str, float], Mapping[str, str]], None]


class LossError(Exception):
    """The loss or its gradient is not finite."""


@dataclass(frozen=True)
class Phase:
    """Epochs over which the learning rate rises and falls once.

    Attributes:
        epochs: how many.
        lr_scale: factor on the stage's learning rates.
        tokens_per_batch: divisor of a batch's summed loss; 0: the batch's own number of tokens.
            With batches of captions of similar length, the latter would weigh a word of a short
            caption more than one of a long caption.
    """

    epochs: int
    lr_scale: float = 1.0
    tokens_per_batch: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train.

    Attributes:
        phases: passes over the training captions, in order.
        patience: stop after this many epochs without a better CIDEr-D; 0 never stops.
        seed: of all randomness.
        precision: fp32 or bf16.
        warmup: share of a phase's steps over which the learning rate rises from zero.
        max_grad_norm: gradients are clipped to this norm.
        grad_accum_steps: batches whose gradients are averaged for an optimizer step.
        ema_decay: decay of the exponential moving average of the weights; 0: none.
    """

    phases: Sequence[Phase]
    patience: int
    seed: int
    precision: str
    warmup: float = 0.02
    max_grad_norm: float = 5.0
    grad_accum_steps: int = 1
    ema_decay: float = 0.0

    @classmethod
    def of(
        cls, options: TrainingOptions, phases: Sequence[Phase], grad_accum_steps: int = 1
    ) -> TrainingConfig:
        """Take from a stage's options what the loop needs."""
        return cls(
            phases,
            options.patience,
            options.seed,
            options.precision,
            grad_accum_steps=grad_accum_steps,
            ema_decay=options.ema_decay,
        )

    @property
    def epochs(self) -> int:
        """Epochs of all phases."""
        return sum(phase.epochs for phase in self.phases)

    def phase_of(self, epoch: int) -> tuple[Phase, int]:
        """Return the phase of an epoch, counted from 1, and how many of its epochs precede it."""
        before = epoch - 1
        for phase in self.phases:
            if before < phase.epochs:
                return phase, before
            before -= phase.epochs
        raise ValueError(f"no epoch {epoch} in {self.phases}")


class Stage(Protocol):
    """A model with data and loss. Each of several processes has one, with the same weights."""

    device: torch.device

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, each with ``params``, ``lr`` and ``weight_decay``."""

    def batches_per_epoch(self, epoch: int) -> int:
        """Return the number of batches that ``batches`` yields."""

    def batches(self, epoch: int) -> Iterator[Any]:
        """Yield the batches of an epoch, in an order that depends on seed and epoch alone.

        Each process yields its share of every batch, or None where that is empty.
        """

    def set_training(self, training: bool) -> None:
        """Switch dropout and the like on or off."""

    def loss(self, batch: Any) -> tuple[Tensor, int]:
        """Return the summed loss of a batch, and the number of tokens or captions summed over."""

    def extra_metrics(self) -> dict[str, float]:
        """Return extra metrics of the last epoch, reduced over all processes."""

    def validate(self) -> Validation:
        """Score the current weights on val; one of the scores is ``CIDEr-D``.

        Processes may share the work; all return the same.
        """

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Return the current weights, without what only resuming needs."""
