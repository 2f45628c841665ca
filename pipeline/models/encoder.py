"""InceptionV3 as an image encoder: weights, transform and precision as one object.

``load_encoder("imagenet")`` gives an ``Encoder`` that maps 299 x 299 images to the
2048 numbers that InceptionV3 pools before its classifier (Szegedy et al., arXiv
1512.00567; torchvision's ``inception_v3``). An encoder knows what it is: its ``identity``
(network, SHA-256 of its weights, transform) is stored in every feature cache and every
checkpoint, so features of one encoder never reach a decoder of another.
"""

from __future__ import annotations

import hashlib
import math
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3

from pipeline.datasets.images import IMAGE_SIZE
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.pretrained import PRETRAINED, pretrained_path
from pipeline.models.quantization import dequantize
from pipeline.models.torch_files import read_torch_file
from pipeline.models.weight_checks import check_state, check_values, shapes_of, short
from pipeline.utils.devices import DTYPES, autocast
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo

# torchvision's Inception3 from its first layer to its pooling, in the order in which its
# forward runs them. All are one after the other, so they can be cut anywhere.
TRUNK_LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "avgpool"),
)

# What weights may be called by; all else is a file.
NAMED_WEIGHTS = ("imagenet", PRETRAINED, "random")

# Seconds that a server may be silent.
PATIENCE = 30.0

# Several threads decode for one GPU; what lies between two layers should lie there only once.
ONE_AT_A_TIME = threading.Lock()


class Encoder(nn.Module):
    """InceptionV3's trunk: uint8 images (B, 299, 299, 3) to float32 features (B, 2048).

    Attributes:
        source: where the weights came from: one of ``NAMED_WEIGHTS`` or a file's path.
        precision: ``fp32``, ``bf16`` or ``fp16``, the arithmetic of the network.
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
        """What this encoder is, for caches and checkpoints."""
        if self._weights_sha256 is None:
            self._weights_sha256 = weights_sha256(self.trunk.state_dict())
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
        """Have the weights hashed anew: to be called after they changed."""
        self._weights_sha256 = None

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bring uint8 (B, 299, 299, 3) to floats in [-1, 1], (B, 3, 299, 299) channels-last.

        torchvision normalises with ImageNet's mean and deviation and its network, with
        ``transform_input=True``, maps the result to the [-1, 1] that Google's weights were
        trained on. The two together are exactly ``pixel / 127.5 - 1``.
        """
        # A channels-last image is what permuting (B, H, W, C) gives, without a copy.
        return pixels.permute(0, 3, 1, 2).float().mul_(1 / 127.5).sub_(1.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode uint8 images (B, 299, 299, 3), RGB, to float32 features (B, 2048)."""
        with autocast(pixels.device, self.precision):
            return self.trunk(self.normalise(pixels)).flatten(1).float()

    def for_inference(self, engine: str = "torch") -> Encoder:
        """Fold every BatchNorm into its convolution; afterwards the encoder only encodes.

        The identity is taken first, as folding changes the tensors but not the function.

        Args:
            engine: ``torch``, or ``openvino`` (see ``openvino_engine``).
        """
        self._weights_sha256 = self.identity.weights_sha256
        self.engine = engine
        fold_for_inference(self.trunk, "fp32" if engine == "openvino" else self.precision)
        if engine == "openvino":
            from pipeline.models.openvino import compile_trunk

            self._compiled = compile_trunk(self.normalise, self.trunk, self.precision)
        return self

    @torch.inference_mode()
    def encode(self, images: Sequence[numpy.ndarray]) -> numpy.ndarray:
        """Encode squares from ``images.to_square``: float32 (len(images), 2048).

        May be called from several threads side by side.
        """
        squares = numpy.stack(images)
        if self._compiled is not None:
            return self._compiled(squares)
        device = next(self.parameters()).device
        pixels = torch.from_numpy(squares)
        if device.type == "cpu":
            return self(pixels).numpy()
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        with ONE_AT_A_TIME:
            features = self(pixels.to(device, non_blocking=True))
        return features.cpu().numpy()


def fold_for_inference(layers: nn.Module, precision: str) -> None:
    """Fold BatchNorm into convolutions, round weights to ``precision``, order channels last.

    Rounding once here spares autocast from doing it in every batch.
    """
    for module in layers.modules():
        if isinstance(module, BasicConv2d) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    layers.requires_grad_(False)
    layers.to(DTYPES.get(precision, torch.float32))
    layers.to(memory_format=torch.channels_last)


def load_encoder(weights: str, precision: str = "fp32") -> Encoder:
    """Build an encoder with the weights that ``weights`` names.

    Args:
        weights: ``imagenet`` (torchvision's, downloaded once), ``pretrained`` (those that come
            with the program), ``auto`` (the first of these that can be had; the second is said
            aloud), ``random`` (seeded and untrained, for tests), or a file: a torchvision
            ``inception_v3`` state dict, full or trunk only, or a checkpoint of
            ``finetune_joint.py``.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    state: dict[str, Tensor] | None = None
    if weights == "auto":
        try:
            state, weights = _imagenet_state(), "imagenet"
        except UserError as error:
            echo(
                f"{error}. For now the encoder of the model that comes with the program is taken "
                "(--weights pretrained)",
                err=True,
            )
            weights = PRETRAINED
    named = weights in NAMED_WEIGHTS
    encoder = Encoder(weights if named else str(Path(weights).resolve()), precision)
    if weights == "random":
        initialise_untrained(encoder)
        return encoder
    if state is None and weights == "imagenet":
        state = _imagenet_state()
    elif state is None:
        state = _read_state(pretrained_path() if weights == PRETRAINED else Path(weights))
    load_trunk(encoder, state, encoder.source)
    return encoder


def load_trunk(encoder: Encoder, state: dict[str, Tensor], source: str) -> None:
    """Put a torchvision ``inception_v3`` state dict into ``encoder``, in float32.

    The classifier and the auxiliary head are passed over, as is a ``module.`` prefix that
    DataParallel left.

    Raises:
        UserError: see ``trunk_state``.
    """
    wanted = encoder.trunk.state_dict()
    try:
        given = trunk_state(state, {name: tensor.shape for name, tensor in wanted.items()})
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    encoder.trunk.load_state_dict({**wanted, **given})
    encoder.source = source
    encoder.forget_identity()


def trunk_shapes() -> dict[str, torch.Size]:
    """Give the shapes of the trunk's state dict, by name."""
    with torch.device("meta"):  # without memory
        return shapes_of(Encoder().trunk)


def trunk_state(state: Any, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Take the trunk's tensors out of an ``inception_v3`` state dict, see ``load_trunk``.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or type, or holds numbers that
            are not finite.
    """
    given = {}
    for key, value in state.items():
        key = key.removeprefix("module.").removeprefix("trunk.")
        if not key.startswith(("fc.", "AuxLogits.")):
            given[key] = value
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    missing = next((name for name in shapes if name not in given and name not in counters), None)
    if missing is not None:
        raise ValueError(f"not an inception_v3 state dict: {missing} is missing")
    unknown = min((name for name in given if name not in shapes), default=None)
    if unknown is not None:
        raise ValueError(f"not an inception_v3 state dict: {short(unknown)} is unknown")
    # They count batches of a training long ago.
    weights = {name: tensor for name, tensor in given.items() if name not in counters}
    check_state(weights, {name: shapes[name] for name in weights}, "encoder")
    check_values(weights, "encoder")
    return weights


def _imagenet_state() -> dict[str, Tensor]:
    """Get torchvision's ImageNet weights from its cache or, once, from the network."""
    weights = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
    usual = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(PATIENCE)  # torch.hub waits for ever
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, HTTPException, EOFError, UnpicklingError) as error:
        # No network or a full disk; a wrong checksum; a connection that broke off; a file in
        # torchvision's cache that was damaged earlier.
        raise UserError(
            f"the ImageNet weights of InceptionV3 cannot be had ({error}); give a file of "
            f"them: --weights FILE (get {weights.url} where there is a network)"
        ) from error
    finally:
        socket.setdefaulttimeout(usual)


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict, or the encoder inside a checkpoint, without running its pickles."""
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file (say imagenet, pretrained or a file's path)"
        )
    state = read_torch_file(path, f"--weights {path}", "a state dict")
    if isinstance(state, dict) and isinstance(state.get("encoder_weights"), dict):
        scales = state.get("encoder_scales", {})
        try:
            state = dequantize(state["encoder_weights"], scales)
        except (LookupError, RuntimeError, AttributeError, TypeError) as error:
            raise UserError(f"--weights {path}: the checkpoint is damaged ({error})") from error
    elif isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise UserError(f"--weights {path}: holds no InceptionV3 weights")
    return state


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Hash names, shapes and float32 values, so that the same weights hash alike in any file."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def initialise_untrained(encoder: Encoder, seed: int = 0) -> None:
    """Fill the trunk with seeded random weights that still tell images apart at the top.

    He initialisation (arXiv 1502.01852) keeps the variance from layer to layer, as
    BatchNorm's statistics stay at 0 and 1. Every filter is centred (as in arXiv 1903.10520):
    what all positive inputs share would otherwise grow with depth and drown the differences.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in encoder.trunk.modules():
            if isinstance(module, nn.Conv2d):
                weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
                module.weight.copy_(weight * math.sqrt(2.0 / weight[0].numel()))
    encoder.source = "random"
    encoder.forget_identity()
