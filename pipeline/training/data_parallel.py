"""The loss of a batch that several processes share: PyTorch's DistributedDataParallel.

Every process computes the loss of its share of a batch, and ``backward`` adds up the gradients
of all of them, over gloo on CPUs and NCCL on GPUs, before any process takes its step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.utils.distributed import World
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    from pipeline.training.stage import Stage


class StageLoss(nn.Module):
    """A stage's loss as a module, as DistributedDataParallel wants it.

    Args:
        stage: whose loss it is.
        parameters: all that it learns.
    """

    def __init__(self, stage: Stage, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.stage = stage
        self.learned = nn.ParameterList(parameters)

    def forward(self, batch: Any) -> tuple[Tensor, int]:
        """Give what ``Stage.loss`` gives; of an empty share, None, 0 for no token."""
        if batch is None:
            # Every parameter has a part in it, as the other processes wait for its gradient.
            return torch.stack([parameter.sum() for parameter in self.learned]).sum() * 0.0, 0
        loss, tokens = self.stage.loss(batch)
        return loss, tokens


def shared_loss(stage: Stage, parameters: Sequence[nn.Parameter], world: World) -> nn.Module:
    """Make a stage's loss one whose gradient is the mean over the processes of ``job``.

    All processes get the weights of rank 0.

    Raises:
        UserError: the device cannot do this.
    """
    module = DistributedDataParallel(
        StageLoss(stage, parameters), process_group=_process_group(stage.device, world)
    )
    # Once, after the first step, the order is chosen in which gradients are added up: here and
    # not in training, so that one that was interrupted adds up in the same order, to the bit.
    loss, _ = module(None)
    loss.backward()
    for parameter in parameters:
        parameter.grad = None
    return module


def _process_group(device: torch.device, world: World) -> torch.distributed.ProcessGroup | None:
    """Choose what carries gradients: NCCL, where each process has a GPU of its own; else gloo,
    which is what the job has already (None).
    """
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device.type}: one process only; use --device cpu for several")
    place = (os.environ.get("GROUP_RANK"), socket.gethostname(), device.index or 0)
    own = device.type == "cuda" and torch.distributed.is_nccl_available()
    places = world.all_gather(place if own else None)
    if None in places or len(set(places)) < world.size:
        return None
    torch.cuda.set_device(device)
    group = torch.distributed.new_group(backend="nccl")
    return cast(torch.distributed.ProcessGroup, group)
