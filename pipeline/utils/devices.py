"""Choice of device, precision and number of threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from pipeline.utils.cores import available_cores
from pipeline.utils.errors import UserError
from pipeline.utils.options import check_device_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` is CUDA if available, else Apple's MPS, else the CPU. Processes on one machine
    (``local_rank``, from 0) use different CUDA devices if there are enough.

    Raises:
        UserError: the device is not available.
    """
    check_device_name(name)
    if name in ("auto", "cuda") and torch.cuda.is_available():
        own = local_rank % max(1, torch.cuda.device_count())
        return torch.device("cuda", own) if own else torch.device("cuda")
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds no such CUDA device; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch finds no Apple GPU here; use --device cpu")
    return device


def inference_batch_size(device: torch.device) -> int:
    """Return the images per forward pass, few on a CPU so that activations stay in cache."""
    return 4 if device.type == "cpu" else 64


def default_workers(device: torch.device) -> int:
    """Return the number of threads that decode and encode images: one per core, at most 8.

    More threads contend for the GIL: on 16 cores, 8 threads decoded 1,530 photographs per second,
    16 threads 1,340.
    """
    return min(8, torch.get_num_threads() if device.type == "cpu" else available_cores())


@contextlib.contextmanager
def threads_per_worker(workers: int) -> Iterator[int]:
    """Divide torch's threads among ``workers`` threads started inside; yield each one's share.

    Each worker must call ``torch.set_num_threads(share)`` itself.
    """
    threads = torch.get_num_threads()
    try:
        yield max(1, threads // workers)
    finally:
        # A worker's setting applies to itself and to all threads that start later.
        torch.set_num_threads(threads)


def choose_precision(name: str, device: torch.device) -> str:
    """Return ``name``, or for ``auto`` the fastest inference precision of the device.

    bf16 on CPUs with AMX and on GPUs that support it, fp16 on older CUDA GPUs, fp32 elsewhere:
    with AVX-512 bf16 but no AMX, InceptionV3 took 1.6 times as long in bf16 as in fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and cpu_has_amx():
        return "bf16"
    return "fp32"


def cpu_has_amx() -> bool:
    """True if the CPU multiplies bfloat16 matrices in hardware."""
    # torch's check is private; if it is missing, assume no AMX.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def cpu_has_int8() -> bool:
    """True if the CPU multiplies 8-bit integers in hardware (VNNI, which every AMX CPU has)."""
    known = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # not in torch 2.10
    return bool(known.get("avx512_vnni") or known.get("avx_vnni"))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return a context that computes in ``precision``; fp32 changes nothing."""
    if precision not in DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def choose_training_precision(name: str, device: torch.device) -> str:
    """Like ``choose_precision``, but fp32 in place of fp16, which would need loss scaling.

    Raises:
        UserError: bf16 on a CPU with AVX2 only, for which oneDNN has no bf16 LSTM.
    """
    lacks_bf16 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if name == "bf16" and lacks_bf16:
        raise UserError("--precision bf16: this CPU cannot train in it; use fp32 or auto")
    precision = choose_precision(name, device)
    return "fp32" if precision == "fp16" else precision


def choose_decoder_precision(name: str, device: torch.device) -> str:
    """Like ``choose_training_precision``, but ``auto`` is fp32 on GPUs.

    The decoder's matrices are so small that conversion costs more than it saves: an H200 trained
    on 30,000 captions/s in fp32 and 27,900 in bf16; at batch size 512, on 79,000 and 49,500.
    """
    if name == "auto" and device.type == "cuda":
        return "fp32"
    return choose_training_precision(name, device)
