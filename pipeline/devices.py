"""Where the arithmetic runs, and in which precision."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from pipeline.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device.

    ``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds no such CUDA device; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch finds no Apple GPU here; use --device cpu")
    return device


def inference_batch_size(device: torch.device) -> int:
    """Give the number of pictures to encode at a time: on a CPU so few that they stay in its
    cache, which is quickest.
    """
    return 8 if device.type == "cpu" else 64


def choose_precision(name: str, device: torch.device) -> str:
    """Turn ``auto`` into the fastest precision that the device computes natively.

    bf16 on CPUs with AMX or AVX-512 bf16 units and on GPUs that have it, fp16 on older
    CUDA GPUs, fp32 elsewhere: emulated half precision is slower than fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and cpu_has_bf16():
        return "bf16"
    return "fp32"


def cpu_has_bf16() -> bool:
    """Tell whether the CPU multiplies bfloat16 in hardware."""
    # torch names these checks with an underscore; without them the answer is a safe no.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Run what follows in ``precision``; nothing is changed for fp32."""
    if precision not in DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def choose_training_precision(name: str, device: torch.device) -> str:
    """Like ``choose_precision``, but fp32 where only fp16 is at hand: its range is too small
    to train in without scaling the loss.
    """
    precision = choose_precision(name, device)
    return "fp32" if precision == "fp16" else precision
