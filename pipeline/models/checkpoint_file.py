"""The checkpoint file: safetensors, which holds tensors and JSON and cannot contain code.

PyTorch files (torchvision state dicts) are read with ``weights_only=True``, which runs no code
either.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.models.pretrained import DOCUMENT
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write

# Type names in the safetensors header.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document; a tensor with two names is stored once.

    Raises:
        UserError: the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in tensors.items():
        first = names.setdefault((tensor.data_ptr(), tensor.shape), name)
        if first == name or not tensor.numel():
            stored[name] = tensor.detach().cpu().contiguous()
        else:
            aliases[name] = first
    text = json.dumps({**document, "aliases": aliases}, ensure_ascii=False)
    # The library's own writer copies all tensors in memory, or replaces the file itself.
    header: dict[str, Any] = {"__metadata__": {DOCUMENT: text}}
    end = 0
    stored = dict(sorted(stored.items(), key=lambda item: -item[1].itemsize))  # aligned
    for name, tensor in stored.items():
        start, end = end, end + tensor.nbytes
        kind = TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path, "wb") as handle:
        handle.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in stored.values():
            handle.write(tensor.flatten().view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by ``write_tensors`` onto the CPU; UserError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            document = json.loads((file.metadata() or {})[DOCUMENT])
            # Copies: the file may be replaced while its tensors are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        for name, first in document.pop("aliases").items():
            tensors[name] = tensors[first]
    except Exception as error:  # damaged files raise many kinds of errors
        raise UserError(
            f"{path}: not a checkpoint of this program, or damaged ({error})"
        ) from error
    return tensors, document


def is_safetensors(path: Path) -> bool:
    """True if a file begins like safetensors: an 8-byte length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_torch_file(path: Path) -> Any:
    """Read a PyTorch file onto the CPU without running code from it; UserError for other files."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # UnpicklingError's message suggests trusting the file.
        known = not isinstance(error, pickle.UnpicklingError)
        reason = f" ({(str(error) or type(error).__name__).splitlines()[0]})" if known else ""
        raise UserError(f"{path}: not a PyTorch file of tensors, or damaged{reason}") from error


def group_of(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``group.``, without that prefix."""
    prefix = f"{group}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def check_state(given: Mapping[str, Any], shapes: Mapping[str, torch.Size], what: str) -> None:
    """Raise ValueError unless a state dict has these names and shapes, and finite floats."""
    if other := sorted(given.keys() ^ shapes.keys()):
        problem = "unknown" if other[0] in given else "missing"
        raise ValueError(f"{other[0]!r:.80} of the {what} is {problem}")
    for name, shape in shapes.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            raise ValueError(f"{name} of the {what} does not have the shape {tuple(shape)}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} of the {what} holds numbers that are not finite floats")
