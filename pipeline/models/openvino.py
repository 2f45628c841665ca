"""The encoder under OpenVINO, which compiles networks for Intel CPUs; an optional dependency."""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pipeline.datasets.images import read_square
from pipeline.utils.devices import default_workers
from pipeline.utils.errors import UserError

# Arithmetic of the operations that are not quantized.
PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
# For fewer images than this, PyTorch finishes before OpenVINO has compiled.
WORTH_COMPILING = 200
# The calibration photographs for int8. As they ship with the program, the features depend only on
# weights and image, as in any precision; other photographs would change them slightly.
CALIBRATION = Path(__file__).parents[1] / "templates" / "examples"
# Headroom above the calibrated maxima; in the last blocks, a few images reach 12 times as far. With
# 1.3 there too, the lowest cosine to fp32 was 0.93 among 1,000 photographs; with 2 everywhere, fine
# differences between images were lost.
HEADROOM, HEADROOM_AT_THE_END = 1.3, 8.0


def choose_engine(
    name: str, device: torch.device, images: int = WORTH_COMPILING, precision: str = "fp32"
) -> str:
    """Resolve ``auto`` to ``openvino`` where it is installed and faster, else to ``torch``.

    Raises:
        UserError: ``openvino`` is requested, or needed for int8, but not installed or not available
            for this device; or int8 is requested with ``torch``.
    """
    if precision == "int8" and name == "torch":
        raise UserError(
            "--precision int8: needs OpenVINO: --engine openvino, or in Python engine='auto'"
        )
    if precision == "int8":
        name = "openvino"
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
    """Compile a folded fp32 trunk for this CPU; ``int8`` quantizes it first.

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
    if precision == "int8":
        _quantize(model, numpy.stack([read_square(path) for path in sorted(CALIBRATION.iterdir())]))
    compiled = _core().compile_model(
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


@functools.cache
def _core() -> Any:
    # One per process: OpenVINO has crashed with several.
    import openvino

    return openvino.Core()


def _quantize(model: Any, pixels: numpy.ndarray) -> None:
    """Insert FakeQuantize, which OpenVINO turns into int8, before all convolutions but the first.

    Inputs, which follow a ReLU, get 256 levels from 0 to their maximum over ``pixels``, uint8
    (B, 299, 299, 3), plus headroom. Weights get 255 levels per output channel. Every consumer of a
    convolution's input, pooling included, reads it quantized, so that int8 passes through.
    """
    import openvino
    from openvino import opset13

    def fake_quantize(values: Any, low: numpy.ndarray, high: numpy.ndarray, levels: int) -> Any:
        return opset13.fake_quantize(values, low, high, low, high, levels).output(0)

    convolutions = [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"][1:]
    sources = [convolution.input_value(0) for convolution in convolutions]
    # Each source once: the branches of a block share one.
    sources = list({source.get_node().get_name(): source for source in sources}.values())
    readers = [source.get_target_inputs() for source in sources]
    peaks = [opset13.reduce_max(source, [0, 1, 2, 3]) for source in sources]
    probe = _core().compile_model(
        openvino.Model(peaks, model.get_parameters()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for source, targets, peak in zip(sources, readers, probe(pixels).values(), strict=True):
        at_the_end = "Mixed_7" in source.get_node().get_friendly_name()
        top = peak * numpy.float32(HEADROOM_AT_THE_END if at_the_end else HEADROOM)
        quantized = fake_quantize(source, 0 * top, top, 256)
        for target in targets:
            target.replace_source_output(quantized)
    for convolution in convolutions:
        weights = convolution.input_value(1)
        top = numpy.abs(weights.get_node().data).max(axis=(1, 2, 3), keepdims=True)
        convolution.input(1).replace_source_output(fake_quantize(weights, -top, top, 255))
