"""What the training loop needs from a stage: model, data, loss, epochs and learning rates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.datasets.vocabulary import Vocabulary
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.ensemble import CaptionDecoder
from pipeline.training.options import TrainingOptions
from pipeline.training.validation import Validation
from pipeline.utils.distributed import SINGLE_PROCESS, World

SEED_STRIDE = 1_000_003  # between the random seeds of epochs; larger than any practical seed

Loss = Callable[[Any], tuple[Tensor, int]]
# Called after every epoch with its log record and its sample captions by image name.
EpochCallback = Callable[[Mapping[str, float], Mapping[str, str]], None]


class LossError(Exception):
    """The loss or its gradient is not finite."""


@dataclass(frozen=True)
class Phase:
    """Epochs over which the learning rate rises and falls once.

    Attributes:
        epochs: their number.
        lr_scale: factor on the stage's learning rates.
        tokens_per_batch: divisor of a batch's summed loss; 0: the batch's own number of tokens.
            With batches of captions of similar length, the latter would give words of short
            captions more weight than words of long ones.
    """

    epochs: int
    lr_scale: float = 1.0
    tokens_per_batch: float = 0.0


class Stage(ABC):
    """A model with data and loss; each process of ``world`` has one, with the same weights."""

    decoder: CaptionDecoder
    vocabulary: Vocabulary
    options: TrainingOptions
    device: torch.device
    world: World = SINGLE_PROCESS
    grad_accum_steps: int = 1  # batches whose gradients are averaged for an optimizer step

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """Return the phases of the training, in order."""

    @abstractmethod
    def parameter_groups(self) -> list[tuple[Iterable[nn.Parameter], float]]:
        """Return the trained parameters in groups, each with its peak learning rate."""

    @abstractmethod
    def batches_per_epoch(self, epoch: int) -> int:
        """Return the number of batches that ``batches`` yields, or a few more."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[Any]:
        """Yield the batches of an epoch, in an order that depends only on seed and epoch.

        Each process yields its share of every batch, or None if that is empty.
        """

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, int]:
        """Return the summed loss of a batch, and the number of tokens or captions summed over."""

    def extra_metrics(self) -> dict[str, float]:
        """Return extra metrics of the last epoch, reduced over all processes."""
        return {}

    @abstractmethod
    def validate(self) -> Validation:
        """Score the current weights on val; the processes share the work and the result."""

    @abstractmethod
    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Return the current weights, without the resume state."""

    def _checkpoint(
        self, epoch: int, scores: dict[str, float], encoder: EncoderIdentity, **parts: Any
    ) -> Checkpoint:
        return Checkpoint(
            decoder_config=self.decoder.config,
            decoder_weights={k: v.cpu() for k, v in self.decoder.state_dict().items()},
            vocabulary=self.vocabulary,
            encoder=encoder,
            epoch=epoch,
            scores=scores,
            settings=asdict(self.options),
            **parts,
        )
