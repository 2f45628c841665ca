"""A fuzzer of the loader of checkpoints; what is loaded captions two pictures.

    pip install atheris
    PYTHONPATH=. python tests/fuzz/fuzz_checkpoint.py FOLDER [--seconds 660]

Run it for ten minutes at least after a change of ``torch_files``, ``checkpoint``,
``checkpoint_checks`` or ``weight_checks``, and with a new torch. FOLDER keeps the inputs that
reached something new, for the next run; an input that failed is ``failed-...`` there, and given
alone as ``read(Path(...).read_bytes())`` it fails again.

An input's first byte chooses what the rest is: a whole file; the pickle of one, which is put
beside the storages of a good one, with a right checksum; or all that the storages hold.
"""

from __future__ import annotations

import pickletools
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import torch
from fuzzing import run

sys.path.insert(0, str(Path(__file__).parents[1]))

# Not the search, nor zipfile and pickletools: they would take most of the time.
LOOKED_AT = ("torch_files", "checkpoint", "checkpoint_checks", "weight_checks", "consensus")
with atheris.instrument_imports(include=[f"pipeline.{name}" for name in LOOKED_AT]):
    from small_checkpoint import PICKLE, STORAGES, saved_members, small_content, use, write_members

FILE, PICKLED, STORED = range(3)
CONTENT = small_content(members=1)
MEMBERS = saved_members(CONTENT)
FOLDER = tempfile.TemporaryDirectory(prefix="checkpoint-")
PATH = Path(FOLDER.name) / "x.pt"


def read(content: bytes) -> None:
    """Load one made-up checkpoint, and caption with it."""
    if not content:
        return
    kind, content = content[0] % 3, content[1:]
    if kind == FILE:
        PATH.write_bytes(content)
    elif kind == PICKLED:
        write_members(PATH, {**MEMBERS, PICKLE: content})
    else:
        write_members(PATH, {**MEMBERS, **stored(content)})
    use(PATH)


def stored(content: bytes) -> dict[str, bytes]:
    """Cut bytes into storages of the sizes that those of the good checkpoint have."""
    members = {}
    for name, whole in MEMBERS.items():
        if name.startswith(STORAGES):
            part, content = content[: len(whole)], content[len(whole) :]
            members[name] = part + whole[len(part) :]
    return members


def mutate(content: bytes, largest: int, seed: int) -> bytes:
    """Change bytes, or the order of a pickle's instructions and which of them there are."""
    generator = random.Random(seed)
    if content[:1] != bytes([PICKLED]) or generator.random() < 0.5:
        return atheris.Mutate(content, largest)
    try:
        starts = [place for _, _, place in pickletools.genops(content[1:]) if place is not None]
    except Exception:  # no longer a pickle
        return atheris.Mutate(content, largest)
    parts = [
        content[1 + a : 1 + b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)
    ]
    for _ in range(generator.randint(1, 4)):
        here, there = generator.randrange(len(parts)), generator.randrange(len(parts))
        change = generator.randrange(4)
        if change == 0:
            parts.insert(there, parts[here])
        elif change == 1 and len(parts) > 1:
            del parts[here]
        elif change == 2:
            parts[here], parts[there] = parts[there], parts[here]
        else:
            parts[here] = parts[here][:1] + generator.randbytes(len(parts[here]) - 1)
    return (content[:1] + b"".join(parts))[:largest]


def seeds() -> list[bytes]:
    """Make a good input of each kind, and a file of torch's old format."""
    torch.save(CONTENT, PATH)
    found = [bytes([FILE]) + PATH.read_bytes()]
    torch.save(CONTENT, PATH, _use_new_zipfile_serialization=False)
    found.append(bytes([FILE]) + PATH.read_bytes())
    found.append(bytes([PICKLED]) + MEMBERS[PICKLE])
    storages = (whole for name, whole in MEMBERS.items() if name.startswith(STORAGES))
    return [*found, bytes([STORED]) + b"".join(storages)]


WORDS = (
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b")R"),
    *(b"ctorch\nFloatStorage\n", b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", b"\x8a\x08"),
    *(
        b"}(",
        b"](",
        b"u",
        b"s",
        b"R",
        b"Q",
        b"b",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x88",
        b"\x89",
        b"N",
    ),
    *(b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"),
    *(b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x7e"),
)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(read, seeds(), WORDS, largest=1 << 15, mutate=mutate)
