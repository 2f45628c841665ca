"""Where the arithmetic runs, and in which precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from pipeline.utils.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device.

    ``auto`` takes CUDA, then Apple's MPS, then the CPU. Of a job's processes on one machine
    (``local_rank``, from 0) each takes a CUDA device of its own, as far as there are enough.

    Raises:
        UserError: the device is not there.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        own = local_rank % max(1, torch.cuda.device_count())
        return torch.device("cuda", own) if own else torch.device("cuda")
    if name == "auto":
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
    """Give the number of images to encode at a time: on a CPU so few that what lies between
    two layers stays in a core's cache, which is quickest.
    """
    return 4 if device.type == "cpu" else 64


def default_workers(device: torch.device) -> int:
    """Give the number of threads that decode and encode images side by side.

    One a core, at most 8: on a CPU each holds a batch between the network's layers, and more
    than 8 wait for Python's lock more than they decode (1,530 photographs of 500 x 375 a second
    by 8 threads, 1,340 by 16, on 16 cores beside an H200).
    """
    return min(8, torch.get_num_threads() if device.type == "cpu" else os.cpu_count() or 1)


@contextlib.contextmanager
def threads_per_worker(workers: int) -> Iterator[int]:
    """Share torch's threads among ``workers`` threads started inside; gives each one's share.

    A worker that has started has to ask for it: ``torch.set_num_threads(share)``.
    """
    threads = torch.get_num_threads()
    try:
        yield max(1, threads // workers)
    finally:
        # What a worker sets holds for itself and for all threads that start later.
        torch.set_num_threads(threads)


def choose_precision(name: str, device: torch.device) -> str:
    """Turn ``auto`` into the fastest precision of the device.

    bf16 on CPUs with AMX and on GPUs that have it, fp16 on older CUDA GPUs, fp32 elsewhere:
    InceptionV3 in bf16 took 1.6 times as long as in fp32 on a Xeon that has AVX-512's bf16
    instructions but not AMX's tiles, and emulated half precision is slower still.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and cpu_has_amx():
        return "bf16"
    return "fp32"


def cpu_has_amx() -> bool:
    """Tell whether the CPU multiplies bfloat16 matrices in hardware."""
    # torch names this check with an underscore; without it the answer is a safe no.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


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


def choose_decoder_precision(name: str, device: torch.device) -> str:
    """Like ``choose_training_precision``, but fp32 on GPUs.

    The decoder's matrices are so small that rounding them costs more than it saves: an H200
    trained on 30,000 captions/s in fp32 and 27,900 in bf16, at batches of 512 79,000 and 49,500.
    """
    if name == "auto" and device.type == "cuda":
        return "fp32"
    return choose_training_precision(name, device)
