"""The exponential moving average (EMA) of the weights: the model that is scored and saved.

And the state of a training, which is what resuming needs beside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.models.checkpoint_file import check_state


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


def training_state(optimizer: torch.optim.Optimizer, ema: EMA) -> dict[str, Tensor]:
    """Return the tensors that resuming needs, by number of the parameter and kind.

    Call it while the parameters hold the average.
    """
    parameters = parameters_of(optimizer)
    tensors = {f"{n}.weight": weight for n, weight in enumerate(ema.shadow or parameters)}
    if ema.shadow:
        tensors |= {f"{n}.average": parameter for n, parameter in enumerate(parameters)}
    for n, parameter in enumerate(parameters):
        tensors |= {f"{n}.{kind}": t for kind, t in optimizer.state.get(parameter, {}).items()}
    return tensors


def restore_training_state(
    tensors: Mapping[str, Tensor], steps: int, optimizer: torch.optim.Optimizer, ema: EMA
) -> None:
    """Restore weights, moments and average from the result of ``training_state``.

    Args:
        tensors: what was saved.
        steps: optimizer steps in the average.
        optimizer, ema: of the same model and settings.

    Raises:
        ValueError: names, shapes or values are not those of this optimizer.
    """
    parameters = parameters_of(optimizer)
    shapes: dict[str, torch.Size] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for n, parameter in enumerate(parameters):
        kinds = ["weight", "average"] if ema.shadow else ["weight"]
        if f"{n}.step" in tensors:  # not before the first step
            shapes[f"{n}.step"] = torch.Size()
            kinds += ["exp_avg", "exp_avg_sq"]
            states[n] = {"step": tensors[f"{n}.step"]}
        shapes |= {f"{n}.{kind}": parameter.shape for kind in kinds}
    check_state(tensors, shapes, "training state")
    for n, state in states.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            # In the memory format of the parameter, which the fused optimizer relies on.
            state[kind] = torch.empty_like(parameters[n]).copy_(tensors[f"{n}.{kind}"])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    with torch.no_grad():
        for n, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"{n}.average" if ema.shadow else f"{n}.weight"])
    ema.load([tensors[f"{n}.weight"] for n in range(len(ema.shadow))], steps)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
