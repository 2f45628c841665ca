"""The encoder under OpenVINO, which compiles networks for Intel CPUs; an optional dependency."""

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

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# For fewer images than this, PyTorch finishes before OpenVINO has compiled.
WORTH_COMPILING = 200


def choose_engine(name: str, device: torch.device, images: int = WORTH_COMPILING) -> str:
    """Resolve ``auto`` to ``openvino`` where it is installed and faster, else to ``torch``.

    Raises:
        UserError: ``openvino`` is requested, but not installed or not for this device.
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

    def __init__(self, normalize: Callable[[Tensor], Tensor], trunk: nn.Module) -> None:
        super().__init__()
        self.normalize, self.trunk = normalize, trunk

    def forward(self, pixels: Tensor) -> Tensor:
        return self.trunk(self.normalize(pixels)).flatten(1)


def compile_trunk(
    normalize: Callable[[Tensor], Tensor], trunk: nn.Module, precision: str
) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Compile a folded fp32 trunk for this CPU.

    Returns:
        A function from uint8 images (B, 299, 299, 3) to float32 features (B, 2048), for up to
        ``devices.default_workers`` threads at once.

    Raises:
        UserError: OpenVINO is installed, but does not load.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            f"openvino is installed but does not load ({error}); reinstall it, or "
            "pip uninstall openvino"
        ) from error

    pixels = torch.zeros(1, 299, 299, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but OpenVINO still needs it
        model = openvino.convert_model(
            _FromPixels(normalize, trunk), example_input=pixels, input=[(-1, 299, 299, 3)]
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
