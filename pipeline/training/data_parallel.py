"""The loss of a batch split across processes, with PyTorch's DistributedDataParallel (DDP).

Each process computes the loss of its share of a batch. ``backward`` averages the gradients of all
processes, over gloo on CPUs and NCCL on GPUs, before any process takes its optimizer step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.stage import Loss
from pipeline.utils.distributed import World
from pipeline.utils.errors import UserError


class LossModule(nn.Module):
    """A loss and the parameters that it trains, as one module for DDP."""

    def __init__(self, compute_loss: Loss, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.compute_loss = compute_loss
        self.trained = nn.ParameterList(parameters)

    def forward(self, batch: Any) -> tuple[Tensor, int]:
        """Return summed loss and token count; zeros if the share is empty (None)."""
        if batch is None:
            # It depends on every parameter, as the other processes wait for all gradients.
            return torch.stack([parameter.sum() for parameter in self.trained]).sum() * 0.0, 0
        return self.compute_loss(batch)


def shared_loss(
    compute_loss: Loss, parameters: Sequence[nn.Parameter], device: torch.device, world: World
) -> nn.Module:
    """Return a loss with gradients averaged over all processes; broadcast rank 0's weights.

    Raises:
        UserError: the device does not support several processes.
    """
    group = _process_group(device, world)
    module = DistributedDataParallel(LossModule(compute_loss, parameters), process_group=group)
    # DDP fixes its gradient summation order once, after the first step. Taking that step here gives
    # a resumed training the same order, so its results are bit-identical.
    module(None)[0].backward()
    module.zero_grad(set_to_none=True)
    return module


def _process_group(device: torch.device, world: World) -> torch.distributed.ProcessGroup | None:
    """Return an NCCL group if each process has a GPU of its own; else None, the default (gloo)."""
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device.type}: one process only; use --device cpu for several")
    place = (os.environ.get("GROUP_RANK"), socket.gethostname(), device.index or 0)
    usable = device.type == "cuda" and torch.distributed.is_nccl_available()
    places = world.all_gather(place if usable else None)
    if None in places or len(set(places)) < world.size:
        return None
    torch.cuda.set_device(device)
    return cast(torch.distributed.ProcessGroup, torch.distributed.new_group(backend="nccl"))
