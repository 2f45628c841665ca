"""Files of ``torch.save`` from strangers: what loading one would do is looked at before it is done.

``torch.load`` with ``weights_only=True`` runs no code of a file, but it allocates what the file
asks for: compressed members, a ``bytearray`` of any length, dictionaries whose keys take years to
hash. So the pickle inside is walked through first, with placeholders for all that it makes. Only
what state dicts and checkpoints consist of may be in it: numbers, strings, lists, dictionaries and
tensors on storages that are in the file. Memory is thus a small multiple of the file's size.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.utils.errors import UserError

# Bytes an element of each kind of storage.
ELEMENT_SIZES = {
    **{"torch DoubleStorage": 8, "torch FloatStorage": 4, "torch HalfStorage": 2},
    **{"torch BFloat16Storage": 2, "torch LongStorage": 8, "torch IntStorage": 4},
    **{"torch ShortStorage": 2, "torch CharStorage": 1, "torch ByteStorage": 1},
    "torch BoolStorage": 1,
}
DICTIONARY = "collections OrderedDict"
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
GLOBALS = frozenset((*ELEMENT_SIZES, DICTIONARY, TENSOR, PARAMETER))

# An instruction makes 100 bytes of objects or so. The model in the box has one for 1,500 bytes;
# vocabularies one for 8 and more.
FREE_INSTRUCTIONS, BYTES_AN_INSTRUCTION = 200_000, 8
# Tensors may share storages, as tied embeddings do: all of them together, over the file's size.
MOST_SHARING = 3
# Storages in torch's format from before 2020 are behind five pickles.
LEGACY_PICKLES = 5

CONSTANTS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
)
WORDS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_torch_file(path: Path, named: str, kind: str) -> Any:
    """Read a file of ``torch.save`` to the CPU.

    Args:
        path: the file.
        named: what errors call it.
        kind: what it should be, such as ``a checkpoint``.

    Raises:
        UserError: torch cannot read it; it holds other things than tensors and plain values; or
            they would take far more memory than the file.
    """
    try:
        with path.open("rb") as file:
            _check_file(file, path.stat().st_size)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnsafeFileError as error:
        raise UserError(f"{named}: not {kind} that torch can read safely ({error})") from error
    except Exception as error:
        raise UserError(f"{named}: not {kind} that torch can read") from error


class UnsafeFileError(ValueError):
    """A file asks for what it should not; its text is for users."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    elements: int
    element_size: int


@dataclass(frozen=True)
class _Placeholder:
    kind: str


_LIST, _TENSOR, _MARK = (_Placeholder(kind) for kind in ("list", "tensor", "mark"))


def _check_file(file: BinaryIO, size: int) -> None:
    """Raise an exception for a file of which torch.load should be kept."""
    if file.read(2) == b"PK":
        with zipfile.ZipFile(file) as archive:
            members = _members(archive, size)
            [pickle] = [name for name in members if name.endswith("/data.pkl")]
            folder = pickle.removesuffix("data.pkl")
            walk = _Walk(size, {n.removeprefix(f"{folder}data/"): s for n, s in members.items()})
            walk.run(pickletools.genops(archive.read(pickle)))
        return
    file.seek(0)
    walk = _Walk(size, None)
    for number in range(LEGACY_PICKLES):
        value = walk.run(pickletools.genops(file))
        if number == 0 and value != torch.serialization.MAGIC_NUMBER:
            raise UnsafeFileError("it is another kind of file")


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Give the sizes of an archive's members, which must be as in the file, and each there once."""
    members: dict[str, int] = {}
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UnsafeFileError("it is compressed")
        members[member.filename] = member.file_size
    # torch finds members whatever their case.
    once = len({name.lower() for name in members}) == len(archive.infolist())
    if not once or sum(members.values()) > size:
        raise UnsafeFileError("its directory is damaged")
    return members


class _Walk:
    """Goes through pickles without making what they describe.

    Attributes:
        members: the size of each storage in the file by its key; None where storages are behind
            the pickles.
    """

    def __init__(self, size: int, members: dict[str, int] | None) -> None:
        self.members = members
        self.instructions_left = FREE_INSTRUCTIONS + size // BYTES_AN_INSTRUCTION
        self.tensor_bytes_left = MOST_SHARING * size
        self.storages: dict[str, tuple[str, int]] = {}
        self.storage_bytes_left = size

    def run(self, instructions: Iterable[tuple[Any, Any, int | None]]) -> Any:
        """Go through one pickle; return the placeholder of what it makes."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for opcode, argument, _ in instructions:
            name = opcode.name
            self.instructions_left -= 1
            if self.instructions_left < 0:
                raise UnsafeFileError("it has far too many small parts")
            if name in CONSTANTS:
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in WORDS:
                stack.append(WORDS[name])
            elif name == "MARK":
                stack.append(_MARK)
            elif name in TUPLES:
                count = len(stack) - TUPLES[name]
                stack[count:] = [_flat_tuple(stack[count:])]
            elif name == "TUPLE":
                items = _above_mark(stack)
                stack.append(_flat_tuple(items))
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append(_LIST)
            elif name in ("APPEND", "APPENDS"):
                _above_mark(stack) if name == "APPENDS" else stack.pop()
                _expect(stack[-1] is _LIST)
            elif name in ("SETITEM", "SETITEMS"):
                items = _above_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _set_items(stack[-1], items)
            elif name == "GLOBAL":
                if argument not in GLOBALS:
                    raise UnsafeFileError("it holds other things than tensors and plain values")
                stack.append(_Global(argument))
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(self._made(stack.pop(), arguments))
            elif name == "BUILD":
                state = stack.pop()
                # The versions of a state dict's modules; other attributes could hide its methods.
                _expect(isinstance(stack[-1], OrderedDict) and list(state) == ["_metadata"])
            elif name == "STOP":
                [value] = stack
                return value
            else:
                _expect(name == "PROTO" and argument == 2)
        raise UnsafeFileError("it is cut off")

    def _storage(self, saved: Any) -> _Storage:
        """Make the placeholder of a storage, which must be in the file."""
        word, kind, key, _, elements, *view = saved
        element_size = ELEMENT_SIZES[kind.name]
        _expect(word == "storage" and type(elements) is int and elements >= 0)
        _expect(type(key) is str and view in ([], [None]))
        if key not in self.storages:
            self.storages[key] = kind.name, elements
            self.storage_bytes_left -= elements * element_size
        # torch takes one that it has by its key alone.
        _expect(self.storages[key] == (kind.name, elements) and self.storage_bytes_left >= 0)
        _expect(self.members is None or self.members.get(key) == elements * element_size)
        return _Storage(elements, element_size)

    def _made(self, function: _Global, arguments: Any) -> Any:
        """Make the placeholder of what a function gives."""
        if function.name == DICTIONARY:
            _expect(arguments == ())
            return OrderedDict()
        if function.name == PARAMETER:
            _expect(arguments[0] is _TENSOR and len(arguments) == 3)
            return _TENSOR
        _expect(function.name == TENSOR)
        storage, offset, size, stride, _, _ = arguments
        _expect(isinstance(storage, _Storage) and len(size) == len(stride))
        _expect(all(type(number) is int and number >= 0 for number in (offset, *size, *stride)))
        elements = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # One that repeats what is stored would grow when it is brought to another type.
        _expect(elements == 0 or (last < storage.elements and elements <= storage.elements))
        self.tensor_bytes_left -= elements * storage.element_size
        if self.tensor_bytes_left < 0:
            raise UnsafeFileError("its tensors together are far larger than the file")
        return _TENSOR


def _expect(true: bool) -> None:
    if not true:
        raise UnsafeFileError("its tensors and values do not fit together")


def _above_mark(stack: list[Any]) -> list[Any]:
    """Take off what was put on a stack since the last mark, and the mark."""
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _flat_tuple(items: list[Any]) -> tuple[Any, ...]:
    """Make a tuple; in one of its kind may be tuples, but in these none.

    A few dozen, each of which holds the last one twice, take years to hash or to compare.
    """
    inner = (item for item in items if isinstance(item, tuple))
    _expect(not any(isinstance(part, tuple) for item in inner for part in item))
    return tuple(items)


def _set_items(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    _expect(isinstance(target, dict) and len(items) % 2 == 0)
    _expect(all(type(key) in (str, int) for key in keys))
    target.update(dict.fromkeys(keys))
