"""The encoder's network under OpenVINO, which fuses and lays it out for Intel's CPUs.

An extra (``pip install -e '.[openvino]'``); where it is installed, extraction on a CPU takes
it of itself. In fp32 it gains about a tenth over PyTorch (``make benchmark``); it is meant for
bf16 with AMX, which it fuses and lays out as PyTorch's eager mode does not.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn

from pipeline.utils.devices import default_workers
from pipeline.utils.errors import UserError

# OpenVINO's words for our precisions.
PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# Captioning fewer images than this, PyTorch is done before OpenVINO has compiled.
WORTH_COMPILING = 200


def choose_engine(name: str, device: torch.device, images: int = WORTH_COMPILING) -> str:
    """Turn ``auto`` into ``openvino`` where it is installed and pays, else ``torch``.

    Raises:
        UserError: ``openvino`` is asked for, but not installed or not for this device.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if name == "openvino" and not installed:
        raise UserError("--engine openvino: not installed; pip install -e '.[openvino]'")
    if name == "openvino" and device.type != "cpu":
        raise UserError(f"--engine openvino: only for --device cpu, not {device}")
    if name == "auto":
        pays = installed and device.type == "cpu" and images >= WORTH_COMPILING
        return "openvino" if pays else "torch"
    return name


class _FromPixels(nn.Module):
    """The trunk with its normalisation, as one network to convert."""

    def __init__(self, normalise: Callable[[Tensor], Tensor], trunk: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        return self.trunk(self.normalise(pixels)).flatten(1)


def compile_trunk(
    normalise: Callable[[Tensor], Tensor], trunk: nn.Module, precision: str
) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Compile a folded fp32 trunk for this CPU.

    Returns:
        A function from uint8 images (B, 299, 299, 3) to float32 features (B, 2048), to be
        called from as many threads as ``devices.default_workers`` says, side by side.

    Raises:
        UserError: OpenVINO is installed, but does not load.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            f"openvino is installed but does not load ({error}); install it anew, or do without: "
            "pip uninstall openvino"
        ) from error

    pixels = torch.zeros(1, 299, 299, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of torch.jit's deprecation, which OpenVINO still needs
        model = openvino.convert_model(
            _FromPixels(normalise, trunk), example_input=pixels, input=[(-1, 299, 299, 3)]
        )
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
            "NUM_STREAMS": default_workers(torch.device("cpu")),
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    requests = threading.local()

    def encode(pixels: numpy.ndarray) -> numpy.ndarray:
        if not hasattr(requests, "request"):
            requests.request = compiled.create_infer_request()
        return numpy.array(requests.request.infer({0: pixels})[0])

    return encode
