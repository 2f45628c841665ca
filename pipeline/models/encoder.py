"""InceptionV3 as an image encoder: weights, transform and precision as one object.

Features are the 2048 numbers that InceptionV3 (Szegedy et al., arXiv 1512.00567) pools before its
classifier. An encoder's ``identity`` is stored in every feature cache and checkpoint, so features
of one encoder never reach a decoder of another.
"""

from __future__ import annotations

import hashlib
import math
import threading
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3

from pipeline.datasets.images import IMAGE_SIZE
from pipeline.models.checkpoint_file import (
    check_state,
    group_of,
    is_safetensors,
    read_tensors,
    read_torch_file,
)
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.pretrained import PRETRAINED, pretrained_path
from pipeline.models.quantization import dequantize
from pipeline.utils.devices import DTYPES, autocast
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo

# The layers of torchvision's Inception3 up to its pooling, which run one after another.
TRUNK_LAYERS = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "maxpool1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "maxpool2",
    "Mixed_5b",
    "Mixed_5c",
    "Mixed_5d",
    "Mixed_6a",
    "Mixed_6b",
    "Mixed_6c",
    "Mixed_6d",
    "Mixed_6e",
    "Mixed_7a",
    "Mixed_7b",
    "Mixed_7c",
    "avgpool",
)

# BatchNorm's batch counters, which only training uses.
COUNTER = "num_batches_tracked"

# Side length of the last feature map before the pooling.
CELLS = 8

# Named weights; anything else is a file.
NAMED_WEIGHTS = ("imagenet", PRETRAINED, "random")

DOWNLOAD_TIMEOUT = 30.0  # seconds without a response

# One forward pass at a time on a GPU, so that memory holds one batch's activations only.
GPU_LOCK = threading.Lock()


class Encoder(nn.Module):
    """InceptionV3's trunk: uint8 images (B, 299, 299, 3) to float32 features (B, 2048).

    Attributes:
        source: where the weights came from: one of ``NAMED_WEIGHTS`` or a file's path.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``, the arithmetic of the network.
        engine: what runs the network: ``torch`` or ``openvino``.
    """

    transform = f"squeeze-{IMAGE_SIZE}-bilinear"

    def __init__(self, source: str = "random", precision: str = "fp32") -> None:
        super().__init__()
        network = Inception3(aux_logits=False, init_weights=False)
        self.trunk = nn.Sequential(
            OrderedDict((name, getattr(network, name)) for name in TRUNK_LAYERS)
        )
        self.source = source
        self.precision = precision
        self.engine = "torch"
        self._compiled: Callable[[numpy.ndarray], numpy.ndarray] | None = None
        self._weights_sha256: str | None = None
        self.eval()

    @property
    def identity(self) -> EncoderIdentity:
        """Network, weights' hash, transform and precision; the hash is computed once."""
        if self._weights_sha256 is None:
            self._weights_sha256 = weights_sha256(self.trunk_weights())
        return EncoderIdentity(
            encoder="inception_v3",
            weights_sha256=self._weights_sha256,
            transform=self.transform,
            precision=self.precision,
            weights_source=self.source,
            torchvision=torchvision.__version__,
            engine=self.engine,
        )

    def forget_identity(self) -> None:
        """Forget the hash of the weights; call this after they change."""
        self._weights_sha256 = None

    def trunk_weights(self) -> dict[str, Tensor]:
        """Return the trunk's state dict without BatchNorm's counters, which only training reads."""
        state = self.trunk.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}

    def normalize(self, pixels: Tensor) -> Tensor:
        """Convert uint8 (B, 299, 299, 3) to floats in [-1, 1], (B, 3, 299, 299) channels-last.

        This is torchvision's normalization followed by its network's ``transform_input``.
        """
        # Permuting (B, H, W, C) gives a channels-last tensor without a copy.
        return pixels.permute(0, 3, 1, 2).float().mul_(1 / 127.5).sub_(1.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode uint8 images (B, 299, 299, 3), RGB, to float32 features (B, 2048)."""
        with autocast(pixels.device, self.precision):
            return self.trunk(self.normalize(pixels)).flatten(1).float()

    def for_inference(self, engine: str = "torch") -> Encoder:
        """Fold every BatchNorm into its convolution; afterwards the encoder can only encode.

        The identity remains that of the original weights.
        """
        self._weights_sha256 = self.identity.weights_sha256
        self.engine = engine
        fold_for_inference(self.trunk, "fp32" if engine == "openvino" else self.precision)
        if engine == "openvino":
            from pipeline.models.openvino import compile_trunk

            self._compiled = compile_trunk(self.normalize, self.trunk, self.precision)
        return self

    @torch.inference_mode()
    def encode(self, images: Sequence[numpy.ndarray]) -> numpy.ndarray:
        """Encode uint8 squares (299, 299, 3): float32 (len(images), 2048). Thread-safe."""
        squares = numpy.stack(images)
        if self._compiled is not None:
            return self._compiled(squares)
        device = next(self.parameters()).device
        pixels = torch.from_numpy(squares)
        if device.type == "cpu":
            return self(pixels).numpy()
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        with GPU_LOCK:
            features = self(pixels.to(device, non_blocking=True))
        return features.cpu().numpy()

    @torch.inference_mode()
    def encode_cells(self, images: Sequence[numpy.ndarray]) -> numpy.ndarray:
        """Encode squares (see ``encode``) to the 8 x 8 cells whose mean is an image's features.

        Runs in PyTorch, whatever the engine. Returns float32 (len(images), 64, 2048), row-major.
        """
        pixels = torch.from_numpy(numpy.stack(images)).to(next(self.parameters()).device)
        with autocast(pixels.device, self.precision):
            cells = self.trunk[:-1](self.normalize(pixels))
        return cells.flatten(2).transpose(1, 2).float().cpu().numpy()


def fold_for_inference(layers: nn.Module, precision: str) -> None:
    """Fold BatchNorm into convolutions, round weights to ``precision``, use channels-last order.

    Autocast would round the weights again for every batch.
    """
    for module in layers.modules():
        if isinstance(module, BasicConv2d) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    layers.requires_grad_(False)
    layers.to(DTYPES.get(precision, torch.float32))
    layers.to(memory_format=torch.channels_last)


def load_encoder(weights: str, precision: str = "fp32") -> Encoder:
    """Build an encoder with the weights named by ``weights``.

    Args:
        weights: ``imagenet`` (torchvision's, downloaded once), ``pretrained`` (those of the
            pretrained model), ``auto`` (the first of these that is available), ``random`` (seeded
            and untrained, for tests), or a file: a torchvision ``inception_v3`` state dict, full
            or trunk only, or a checkpoint with an encoder.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``int8`` (OpenVINO only).

    Raises:
        UserError: the weights are not available or do not fit.
    """
    state: dict[str, Tensor] | None = None
    if weights == "auto":
        try:
            state, weights = _imagenet_state(), "imagenet"
        except UserError as error:
            echo(
                f"{error}. Using the pretrained model's encoder instead (--weights pretrained)",
                err=True,
            )
            weights = PRETRAINED
    named = weights in NAMED_WEIGHTS
    encoder = Encoder(weights if named else str(Path(weights).resolve()), precision)
    if weights == "random":
        _initialise_untrained(encoder)
    else:
        load_trunk(encoder, state or _read_state(weights), encoder.source)
    return encoder


def load_trunk(encoder: Encoder, state: Mapping[str, Any], source: str) -> None:
    """Load a torchvision ``inception_v3`` state dict into ``encoder``, in float32.

    The classifier, the auxiliary head and counters are ignored, as are name prefixes added by
    DataParallel and ``Encoder``.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or not of finite floats.
    """
    shapes = {name: tensor.shape for name, tensor in encoder.trunk_weights().items()}
    given = {}
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix("trunk.")
        if not name.startswith(("fc.", "AuxLogits.")) and not name.endswith(COUNTER):
            given[name] = value
    try:
        check_state(given, shapes, "InceptionV3 state dict")
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    encoder.trunk.load_state_dict(given, strict=False)  # without counters
    encoder.source = source
    encoder.forget_identity()


def _imagenet_state() -> dict[str, Tensor]:
    """Return torchvision's ImageNet weights from its cache or, once, from the network."""
    url = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not file.is_file():
        try:
            _download(url, file)
        except (OSError, HTTPException, UserError) as error:
            raise UserError(
                f"the ImageNet weights of InceptionV3 cannot be downloaded ({error}); pass a file "
                f"instead: --weights FILE (download {url} on a machine with a network)"
            ) from error
    return read_torch_file(file)


def _download(url: str, target: Path) -> None:
    """Download a torchvision file, as ``torch.hub`` does, but give up on a silent server."""
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response,
        atomic_write(target, "wb") as file,
        progress_bar(desc=target.name, unit="B", unit_scale=True) as bar,
    ):
        while block := response.read(1 << 20):
            digest.update(block)
            file.write(block)
            bar.update(len(block))
        if not digest.hexdigest().startswith(target.stem.rpartition("-")[2]):
            raise HTTPException("wrong checksum")


def _read_state(weights: str) -> dict[str, Tensor]:
    """Read a state dict, or the encoder inside a checkpoint; see ``load_encoder``."""
    if weights == "imagenet":
        return _imagenet_state()
    path = pretrained_path() if weights == PRETRAINED else Path(weights)
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file (use imagenet, pretrained or a file's path)"
        )
    scales: dict[str, Tensor] = {}
    state: Any
    if path.suffix == ".safetensors" or is_safetensors(path):
        tensors, _ = read_tensors(path)
        state, scales = group_of(tensors, "encoder"), group_of(tensors, "encoder_scales")
    else:
        state = read_torch_file(path)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise UserError(f"--weights {path}: holds no InceptionV3 weights")
    try:
        return dequantize(state, scales)
    except (LookupError, RuntimeError, AttributeError) as error:
        raise UserError(f"--weights {path}: the checkpoint is damaged ({error})") from error


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Hash names, shapes and float32 values: the same weights have the same hash in any file."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _initialise_untrained(encoder: Encoder) -> None:
    """Fill the trunk with seeded random weights whose features still differ between images.

    He initialisation (arXiv 1502.01852) keeps the variance from layer to layer. Every filter is
    centred (arXiv 1903.10520): the mean of positive inputs would otherwise drown differences.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in encoder.trunk.modules():
            if isinstance(module, nn.Conv2d):
                weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
                module.weight.copy_(weight * math.sqrt(2.0 / weight[0].numel()))
