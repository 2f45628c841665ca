"""The exponential moving average (EMA) of the weights, and what resuming a training needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.models.checkpoint_file import check_state


class EMA:
    """A moving average of weights over optimizer steps: the model that is scored and saved.

    The decay rises from 0.1 to its full value; otherwise the random initial weights would linger.

    Attributes:
        parameters: the weights that are averaged.
        shadow: the average, or, while ``swap`` is in effect, the trained weights; empty without
            decay.
        steps: optimizer steps averaged so far.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.shadow = [parameter.detach().clone() for parameter in parameters if decay]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        if self.shadow:
            self.steps += 1
            decay = min(self.decay, self.steps / (self.steps + 9))
            torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the trained weights and the average."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=False):
            trained = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(trained)


def training_state(optimizer: torch.optim.Optimizer, ema: EMA) -> dict[str, Tensor]:
    """Return the tensors needed for resuming, by parameter number and kind.

    Call it while the parameters hold the average.
    """
    tensors = {f"{n}.weight": weight for n, weight in enumerate(ema.shadow or ema.parameters)}
    for n, parameter in enumerate(ema.parameters):
        if ema.shadow:
            tensors[f"{n}.average"] = parameter
        tensors |= {f"{n}.{kind}": t for kind, t in optimizer.state.get(parameter, {}).items()}
    return tensors


@torch.no_grad()
def restore_training_state(
    tensors: Mapping[str, Tensor], steps: int, optimizer: torch.optim.Optimizer, ema: EMA
) -> None:
    """Restore weights, moments and average from the result of ``training_state``.

    Raises:
        ValueError: names, shapes or values do not match this optimizer.
    """
    kinds = ["weight", "average"] if ema.shadow else ["weight"]
    shapes = {f"{n}.{kind}": p.shape for n, p in enumerate(ema.parameters) for kind in kinds}
    stepped = [n for n in range(len(ema.parameters)) if f"{n}.step" in tensors]
    for n in stepped:
        shape = ema.parameters[n].shape
        shapes |= {f"{n}.step": torch.Size(), f"{n}.exp_avg": shape, f"{n}.exp_avg_sq": shape}
    check_state(tensors, shapes, "training state")
    states = {}
    for n in stepped:
        states[n] = {"step": tensors[f"{n}.step"]}
        for kind in ("exp_avg", "exp_avg_sq"):
            # Keep the parameter's memory format, which the fused optimizer relies on.
            states[n][kind] = torch.empty_like(ema.parameters[n]).copy_(tensors[f"{n}.{kind}"])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    for n, parameter in enumerate(ema.parameters):
        parameter.copy_(tensors[f"{n}.weight"])
        if ema.shadow:
            ema.shadow[n].copy_(tensors[f"{n}.average"])
    ema.steps = steps
