"""How long and how fast to train."""

from __future__ import annotations

from dataclasses import dataclass


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
        accumulate: batches whose gradients are summed before a step.
        average: decay of a running mean of the weights, which is what is scored and saved as the
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
    accumulate: int = 1
    average: float = 0.0

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
